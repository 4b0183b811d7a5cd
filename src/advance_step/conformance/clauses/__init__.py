"""What each operator promises, as data. `plain` is the step that three of them share, `common` what all are made of."""
