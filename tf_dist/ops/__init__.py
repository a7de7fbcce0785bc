"""Operations around a job: hostfiles, the supervisor that restarts it, the doctor."""
