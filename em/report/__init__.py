"""Tables and figures of judged responses."""
