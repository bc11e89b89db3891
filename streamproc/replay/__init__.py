"""Yesterday's stream against tomorrow's model: captures of topics, their replay, and what it changed.

    capture file   records of topics, one a line, with everything that Kafka knows of them
    run            a capture, written into topics (or given to a backend) again, under an id of its own
    diff           the results of a run against those of another one, or against golden files

Results carry the headers of the records that they are of, so the marks that a run puts on a record (``marks``) are on
its result too: that is how a run's results are found among others, and matched by source record.
"""
