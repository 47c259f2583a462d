package e2e

import (
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestDisksInIOThread: a disk served outside of QEMU's main loop, under load, is
// copied as any other, over and over, and the guest never notices.
func TestDisksInIOThread(t *testing.T) {
	x := newTool(t)
	cfg := vmtest.Config{MemoryMiB: 192, Append: "GD_LOG=0", WSMiB: 8, Disks: []vmtest.Disk{{FS: "ext4"}, {Bus: "virtio-blk", Format: "raw", MiB: 16}},
		Args: []string{"-object", "iothread,id=io0", "-global", "virtio-blk-pci.iothread=io0"}}
	v := vmtest.Start(t, cfg)
	v.WaitSerial(t, "^LOG started=[1-9]", 60*time.Second)
	for range 6 {
		x.checkpoint(t, v.PID())
	}
	wantRunning(t, v)
}
