"""Problems whose constants are known, and bounds on them."""
