package guest

import (
	"bytes"
	"fmt"
)

// File kinds, as in st_mode.
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeChar = 0o020000
	modeLink = 0o120000
)

// file is one member of an initramfs. A mode without a kind means a plain file;
// a link's data is its target.
type file struct {
	name         string
	mode         uint32
	data         []byte
	major, minor uint32 // of a device node
}

// cpio writes a newc archive (Documentation/driver-api/early-userspace/
// buffer-format.rst). Owner root, time zero: equal input gives equal output.
func cpio(files []file) []byte {
	var b bytes.Buffer
	pad := func() {
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	for i, f := range append(files[:len(files):len(files)], file{name: "TRAILER!!!", mode: modeFile}) {
		mode := f.mode
		if mode>>12 == 0 {
			mode |= modeFile
		}
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			i+1, mode, 0, 0, 1, 0, len(f.data), 0, 0, f.major, f.minor, len(f.name)+1, 0)
		b.WriteString(f.name)
		b.WriteByte(0)
		pad()
		b.Write(f.data)
		pad()
	}
	return b.Bytes()
}
