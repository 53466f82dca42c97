"""Made for other API majors. Must not be imported."""

raise AssertionError("this module was imported")
