"""The dataflow: Ray Data and storage. Which bytes go where, once."""
