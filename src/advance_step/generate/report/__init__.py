"""`--report`: a page of what a run did, in figures that do not grow with it."""
