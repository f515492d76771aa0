"""Pages and pictures about recurrences, for people: the report, the gallery, the charts."""
