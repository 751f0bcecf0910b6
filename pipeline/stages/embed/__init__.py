"""Stage `embed`: shards in, features out."""
