"""Before a scheduled run trains: is there anything new, and where does training start?"""
