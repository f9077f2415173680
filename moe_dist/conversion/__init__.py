"""Conversion of standard experts to clustered ones: calibration, grouping, shared bases and low-rank residuals."""
