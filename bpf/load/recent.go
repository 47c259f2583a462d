package load

import (
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Recent refuses kernels before 6.6. They load some of the programs that hook into the
// scheduler, faults and system calls, but a 6.1 was seen to lock up on an attempt, and
// no figure is worth that.
func Recent() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	var major, minor int
	release := unix.ByteSliceToString(u.Release[:])
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n == 2 && (major > 6 || major == 6 && minor >= 6) {
		return nil
	}
	return fmt.Errorf("programs are not attached before Linux 6.6: %w", ebpf.ErrNotSupported)
}
