package vm

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// Prediction says what a checkpoint would cost, and how that was estimated.
type Prediction struct {
	UsedBytes   uint64        `json:"used_bytes"`  // present in guest memory: what is saved at most
	TotalBytes  uint64        `json:"total_bytes"` // of all blocks
	HugeBytes   uint64        `json:"huge_bytes"`  // of UsedBytes in transparent huge pages
	Devices     int           `json:"devices"`     // with noticeable device state (PCI)
	DeviceState time.Duration `json:"device_state_ns"`
	Arm         time.Duration `json:"arm_ns"`        // re-arming what was written since the pre-arm
	StopAndCont time.Duration `json:"stop_cont_ns"`  // QEMU's own part
	Pause       time.Duration `json:"pause_ns"`      // sum
	CopyInPause time.Duration `json:"copy_pause_ns"` // added by modes that copy while stopped
	How         []string      `json:"how"`
}

// deviceStateCost is what saving the device state took, by number of virtio-pci
// devices (q35, 2 shared cores): interpolated between, extended at the last slope.
var deviceStateCost = []struct {
	devices int
	cost    time.Duration
}{{0, 650 * time.Microsecond}, {4, 2800 * time.Microsecond}, {12, 24 * time.Millisecond}}

func predictDeviceState(n int) time.Duration {
	pts := deviceStateCost
	i := 1
	for i < len(pts)-1 && n > pts[i].devices {
		i++
	}
	a, b := pts[i-1], pts[i]
	return a.cost + time.Duration(n-a.devices)*(b.cost-a.cost)/time.Duration(b.devices-a.devices)
}

const (
	stopContCost   = time.Millisecond        // stop and cont with a quick flush
	armCostPerGiB  = 1800 * time.Microsecond // scan and re-arm with few pages written since the pre-arm, per GiB used
	copyCostPerGiB = 400 * time.Millisecond  // one core copying to memory while stopped, per GiB used
	gib            = float64(1 << 30)        // bytes
)

// PredictPause estimates pause and bytes of a checkpoint of this VM. It reads
// smaps (milliseconds per GiB in 4 KiB pages) and asks for the PCI devices.
// Layout is resolved if it was not before.
func PredictPause(ctx context.Context, t *Target) (Prediction, error) {
	var p Prediction
	if t.Blocks == nil {
		if _, err := t.Layout(ctx); err != nil {
			return p, err
		}
	}
	vmas, err := t.Process.ReadSmaps()
	if err != nil {
		return p, err
	}
	for i := range t.Blocks {
		b := &t.Blocks[i]
		p.TotalBytes += b.UsedBytes
		for _, v := range vmasAt(vmas, b.HVA, b.mapBytes()) {
			p.UsedBytes += min(v.RSSBytes+v.SwapBytes+v.PrivateHugetlbBytes+v.SharedHugetlbBytes, v.Bytes())
			p.HugeBytes += v.AnonHugeBytes + v.ShmemPMDBytes
		}
	}
	text, err := t.QMP.HMP(ctx, "info pci")
	if err != nil {
		return p, err
	}
	p.Devices = strings.Count(text, "PCI device 1af4:")
	used := float64(p.UsedBytes) / gib
	p.DeviceState = predictDeviceState(p.Devices)
	p.Arm = time.Duration(used * float64(armCostPerGiB))
	p.StopAndCont = stopContCost
	p.Pause = p.StopAndCont + p.DeviceState + p.Arm
	p.CopyInPause = time.Duration(used * float64(copyCostPerGiB))
	p.How = []string{
		"used bytes: pages present by smaps (Rss and Swap) of the mappings of the RAM blocks",
		fmt.Sprintf("device state: by the number of virtio PCI devices (%d), from measurements with 0, 4 and 12 of them", p.Devices),
		"arm: 1.8 ms per GiB used, a scan that re-arms the few pages written since the pre-arm",
		"stop and cont: 1 ms with nothing left to flush",
		"copying in the pause (modes stop and buffer): 0.4 s per GiB used",
	}
	return p, nil
}
