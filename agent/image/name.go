package image

import (
	"crypto/sha256"
	"encoding/hex"
	"net/url"
)

// maxFileName leaves room for what callers put before and behind it: a component of a
// path has 255 bytes.
const maxFileName = 200

// FileName is the name of a VM as that of a file, beside files of other VMs: escaped, and
// if that takes too much room the beginning of it, with a hash of the whole.
func FileName(vm string) string {
	name := url.PathEscape(vm)
	if len(name) <= maxFileName {
		return name
	}
	sum := sha256.Sum256([]byte(vm))
	end := "," + hex.EncodeToString(sum[:16]) // a comma is always escaped: no other name comes to this
	return name[:maxFileName-len(end)] + end
}
