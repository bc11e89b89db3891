"""The Kafka clients of the data path and of the commands, in one place to import them from."""

from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.connection import Cluster, probe
from streamproc.broker.consumer import KafkaConsumer
from streamproc.broker.producer import DEFAULT_BATCH_BYTES, KafkaProducer

__all__ = ["DEFAULT_BATCH_BYTES", "Cluster", "KafkaAdmin", "KafkaConsumer", "KafkaProducer", "probe"]
