"""The package ``cleave``: the rooms at the top of the repository are its sub-packages, ``cleave.losses`` and so on."""
