"""The alignment of a student's attention with the teacher's word maps: Aligner, loss and schedules."""
