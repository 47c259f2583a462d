package disk

import "testing"

// TestOurs: a restored machine has nodes and jobs whose names begin as ours do; to take
// those out would take its disks away.
func TestOurs(t *testing.T) {
	for _, name := range []string{FilterNode(0), FleeceNode(11), SnapNode(2), TargetNode(3), CopyJob(4)} {
		if !Ours(name) {
			t.Errorf("%s is not ours", name)
		}
	}
	for _, name := range []string{"", "ckagent-", "ckagent-medium-1", "ckagent-flatten-0", "ckagent-disk0", "xckagent-cbw-0", "ckagent-cbw-0x", "ckagent-cbw-"} {
		if Ours(name) {
			t.Errorf("%q is ours", name)
		}
	}
	if !OurBitmap(BitmapName("x")) || !OurBitmap(DeltaBitmap) || OurBitmap("backup-1") {
		t.Error("bitmaps are mistaken")
	}
}
