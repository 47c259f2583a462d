package store

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
)

const (
	markerName = "store.json"
	lockName   = "lock"
	vmsName    = "vms"
	pinName    = "pinned"
	tmpSuffix  = ".tmp"

	maxVMDir = 200 // bytes; a component may have 255
)

// vmDir is the directory name of a VM: its name with everything but letters,
// digits, "_", "-" and inner dots as %XX, and shortened by a hash if too long.
func vmDir(vm string) string {
	var b strings.Builder
	for i := range len(vm) {
		c := vm[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
			c == '_' || c == '-' || c == '.' && i > 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	s := b.String()
	if len(s) > maxVMDir {
		s = fmt.Sprintf("%s~%016x", s[:maxVMDir-17], xxhash.Sum64String(vm))
	}
	return s
}

// vmName is the name a directory stands for; of a shortened one the directory's
// own, since the rest is known to the manifests alone.
func vmName(dir string) string {
	var b strings.Builder
	for i := 0; i < len(dir); i++ {
		if dir[i] == '%' && i+2 < len(dir) {
			if v, err := strconv.ParseUint(dir[i+1:i+3], 16, 8); err == nil {
				b.WriteByte(byte(v))
				i += 2
				continue
			}
		}
		b.WriteByte(dir[i])
	}
	return b.String()
}

// Ids sort by the time at which the checkpoint began: 20261121T234612123-4f3a9c1e.
const idTime = "20060102T150405.000"

func formatID(t time.Time, random uint32) string {
	return strings.Replace(t.UTC().Format(idTime), ".", "", 1) + fmt.Sprintf("-%08x", random)
}

// parseID reports whether a directory name is an id, and its time.
func parseID(s string) (time.Time, bool) {
	if len(s) != len("20060102T150405000-00000000") || s[18] != '-' {
		return time.Time{}, false
	}
	for _, c := range []byte(s[19:]) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return time.Time{}, false
		}
	}
	t, err := time.Parse(idTime, s[:15]+"."+s[15:18])
	return t, err == nil
}

// matchesID reports whether an operator's abbreviation means this id: a prefix of
// it, or of its random part.
func matchesID(id, ref string) bool {
	return ref != "" && (strings.HasPrefix(id, ref) || strings.HasPrefix(id[19:], ref))
}
