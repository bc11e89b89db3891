"""Everything that speaks Kafka: the only folder that imports a Kafka client."""
