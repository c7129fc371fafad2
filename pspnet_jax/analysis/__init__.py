"""`--mode report`: why a network fails, as a folder of pages, pictures and tables; report.py has the mode.

One pass over a split (report.py) gives the statistics of each image (image.py, based on regions.py), which are added up
(totals.py) and described as one JSON document (document.py), from which the page (page/) and the tables (tables.py) are made.
"""
