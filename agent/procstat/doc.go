// Package procstat reads /proc/PID/stat: who a process is and whether it still runs. And
// /proc/meminfo and /proc/stat: what the host has left, of memory and of processors.
//
// A pid names a process only until it is reused; a pid and StartTicks together name
// it for good (within one boot and one pid namespace). Whoever needs the answer to
// stay true holds a pidfd across the read.
//
// The package holds no state. Read fails with an error that matches fs.ErrNotExist or
// unix.ESRCH when there is no such process.
package procstat
