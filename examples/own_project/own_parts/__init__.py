"""Parts of a project of one's own: a backbone, a loss, a codec and a data set."""
