package image

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// sealName is the extended attribute that says which content a volume was found to
// have, and what the file looked like then. It is a memory, not a part of the format:
// where it is missing or does not fit, the content is read again.
const sealName = "user.ckagent.content"

// sealOf describes a file that holds a volume's content and has not been written to or
// replaced since: a copy has another inode, a change another time.
func sealOf(path string, v Volume) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return fmt.Sprintf("%v %d %d %d %d.%09d", v.Checksum, v.Bytes, st.Dev, st.Ino, st.Mtim.Sec, st.Mtim.Nsec), nil
}

// Seal notes that a file was read and is the volume. Nothing is lost where that cannot
// be noted: it is read again.
func Seal(path string, v Volume) {
	if s, err := sealOf(path, v); err == nil {
		_ = unix.Lsetxattr(path, sealName, []byte(s), 0)
	}
}

// Sealed reports whether a file was read before, was the volume then, and has not
// been touched since. It does not see a medium that forgets: Store.Verify does.
func Sealed(path string, v Volume) bool {
	want, err := sealOf(path, v)
	if err != nil {
		return false
	}
	var buf [256]byte
	n, err := unix.Lgetxattr(path, sealName, buf[:])
	return err == nil && string(buf[:n]) == want
}
