package e2e

import (
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/guest"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestDisksInIOThread: a disk served outside of QEMU's main loop, under load, is
// copied as any other, over and over, and the guest never notices; where QEMU might
// not survive that, it is refused.
func TestDisksInIOThread(t *testing.T) {
	start := func(t *testing.T, q guest.QEMU) *vmtest.VM {
		v := vmtest.Start(t, vmtest.Config{QEMU: q, MemoryMiB: 192, Append: "GD_LOG=0", WSMiB: 8,
			Disks: []vmtest.Disk{{FS: "ext4"}, {Bus: "virtio-blk", Format: "raw", MiB: 16}},
			Args:  []string{"-object", "iothread,id=io0", "-global", "virtio-blk-pci.iothread=io0"}})
		v.WaitSerial(t, "^LOG started=[1-9]", 60*time.Second)
		return v
	}
	t.Run("7.2", func(t *testing.T) {
		x := newTool(t)
		v := start(t, guest.QEMU{})
		x.fails(t, exitRefused, []string{"I/O thread", "--disks none"}, "checkpoint", itoa(v.PID()), "--store", x.store)
		x.checkpoint(t, v.PID(), "--disks", "none")
		wantRunning(t, v)
	})
	t.Run("10", func(t *testing.T) {
		q, err := guest.QEMU10(t.Context())
		if err != nil {
			vmtest.Skip(t, "qemu10", "QEMU 10 cannot be unpacked here: %v", err)
		}
		x := newTool(t)
		v := start(t, q)
		for range 6 {
			x.checkpoint(t, v.PID())
		}
		wantRunning(t, v)
	})
}
