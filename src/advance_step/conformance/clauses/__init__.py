"""What each contract promises, as data: a module per contract, and in `common` what they share."""
