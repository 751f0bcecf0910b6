"""Ray: the session, pools of actors, progress."""
