"""What a backend's batches cost, measured: probing, fitting, and telling."""
