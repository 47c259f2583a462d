package restore

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
)

// checkBinary says whether a QEMU binary may be started. A manifest is data: what
// it names is run only if it is called like a QEMU and lies where root alone can
// put things. A binary that the operator named himself must only be a program.
func checkBinary(path string, chosen bool) error {
	refuse := func(format string, args ...any) *problem.Error {
		return problem.New(problem.Refused, "start", path, format, args...)
	}
	if !filepath.IsAbs(path) {
		return refuse("the path of the QEMU binary is not absolute").WithHint("name one: --qemu PATH")
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return refuse("%w", err).WithHint("install the QEMU the VM ran on, or name another one: --qemu PATH")
		}
		return refuse("%w", err)
	}
	st, err := os.Stat(real)
	if err != nil {
		return refuse("%w", err)
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o111 == 0 {
		return refuse("%s is no program", real)
	}
	if chosen {
		return nil
	}
	if !vm.AllowedBinary(path) || !vm.AllowedBinary(real) {
		return refuse("the checkpoint names a binary that is not called like a QEMU").
			WithHint("if it is one, say so: --qemu %s", path)
	}
	for at := real; ; at = filepath.Dir(at) {
		var st unix.Stat_t
		if err := unix.Stat(at, &st); err != nil {
			return refuse("%s: %w", at, err)
		}
		sticky := st.Mode&unix.S_ISVTX != 0 && at != real
		if st.Uid != 0 || st.Mode&0o022 != 0 && !sticky {
			return refuse("%s can be changed by others than root (uid %d, mode %04o)", at, st.Uid, st.Mode&0o7777).
				WithHint("mend its owner and mode, or name a binary yourself: --qemu PATH")
		}
		if at == "/" || !strings.HasPrefix(at, "/") {
			return nil
		}
	}
}
