package disk

import (
	"fmt"
	"regexp"
	"strings"
)

// Prefix begins every name of ours in QEMU: nodes, jobs and bitmaps.
const Prefix = "ckagent-"

// FdsetOpaque marks the descriptor sets of disks; those that a checkpoint makes for
// the device state have another mark.
const FdsetOpaque = "ckagent-disk"

// Names of what one drive gets, by its number in the checkpoint.
func FilterNode(n int) string { return fmt.Sprintf(Prefix+"cbw-%d", n) }
func FleeceNode(n int) string { return fmt.Sprintf(Prefix+"fleece-%d", n) }
func SnapNode(n int) string   { return fmt.Sprintf(Prefix+"snap-%d", n) }
func TargetNode(n int) string { return fmt.Sprintf(Prefix+"target-%d", n) }
func CopyJob(n int) string    { return fmt.Sprintf(Prefix+"copy-%d", n) }

// Names of what a drive gets that is switched to an overlay instead.
func OverlayNode(n int) string { return fmt.Sprintf(Prefix+"overlay-%d", n) }
func CommitJob(n int) string   { return fmt.Sprintf(Prefix+"commit-%d", n) }

// OverlayOpaque marks the descriptor set of an overlay. It ends with the path of the
// file, so that whoever puts the drive back can remove it.
func OverlayOpaque(n int, path string) string {
	return fmt.Sprintf("%s-overlay-%d %s", FdsetOpaque, n, path)
}

// overlayOf takes an OverlayOpaque apart.
func overlayOf(opaque string) (node, path string, ok bool) {
	rest, ok := strings.CutPrefix(opaque, FdsetOpaque+"-overlay-")
	if !ok {
		return "", "", false
	}
	n, path, ok := strings.Cut(rest, " ")
	return Prefix + "overlay-" + n, path, ok
}

// overlayFile matches the names of overlays: that of the image, and the checkpoint's id.
var overlayFile = regexp.MustCompile(`.\.ckagent-[0-9]{8}T[0-9]{9}-[0-9a-f]{8}$`)

// OverlayName is the name of the file that takes an image's writes while it is copied
// for a checkpoint.
func OverlayName(image, id string) string { return image + ".ckagent-" + id }

// IsOverlayName reports whether OverlayName can have made a name.
func IsOverlayName(name string) bool { return overlayFile.MatchString(name) }

// DeltaBitmap is the name of the bitmap on a snapshot node that limits the copy.
const DeltaBitmap = Prefix + "delta"

const bitmapPrefix = Prefix + "bitmap-"

// BitmapName is the name of the bitmap of what was written since a checkpoint.
func BitmapName(id string) string { return bitmapPrefix + id }

// BitmapOwner is the id of the checkpoint that a bitmap of ours belongs to.
func BitmapOwner(name string) (id string, ok bool) { return strings.CutPrefix(name, bitmapPrefix) }

var ours = regexp.MustCompile(`^` + Prefix + `(cbw|fleece|snap|target|copy|overlay|commit)-[0-9]+$`)

// Ours reports whether a node or job was made by a checkpoint. Restored machines have
// nodes whose names begin likewise, and those are theirs.
func Ours(name string) bool { return ours.MatchString(name) }

// OurBitmap reports whether a bitmap was made by a checkpoint.
func OurBitmap(name string) bool {
	return name == DeltaBitmap || strings.HasPrefix(name, bitmapPrefix)
}
