package main

import (
	"fmt"

	"github.com/ckagent/ckagent/agent/image"
)

// diskView is a disk of a checkpoint as verbs show it.
type diskView struct {
	Name      string           `json:"name"`
	Path      string           `json:"path"`
	Format    string           `json:"format"`
	SizeBytes uint64           `json:"size_bytes"`
	Method    image.DiskMethod `json:"method"`
	Volume    string           `json:"volume,omitempty"` // the newest of the chain
	Chain     int              `json:"chain"`            // volumes in it
	Bytes     uint64           `json:"volume_bytes"`     // of the newest
}

func diskViews(m *image.Manifest) []diskView {
	out := []diskView{}
	for _, d := range m.Disks {
		v := diskView{Name: d.Name, Path: d.Path, Format: d.Format, SizeBytes: d.SizeBytes, Method: d.Method, Chain: len(d.Volumes)}
		if len(d.Volumes) > 0 {
			v.Volume, v.Bytes = d.Volumes[0].Name, d.Volumes[0].Bytes
		}
		out = append(out, v)
	}
	return out
}

func printDisks(a *app, disks []diskView) {
	for _, d := range disks {
		switch {
		case d.Method == image.DiskNone:
			fmt.Fprintf(a.out, "disk %s (%s) is NOT in this checkpoint: its memory fits no disk of another time\n", d.Name, d.Path)
		case d.Chain == 1:
			fmt.Fprintf(a.out, "disk %s: %s copied whole\n", d.Name, sizeText(d.Bytes))
		default:
			fmt.Fprintf(a.out, "disk %s: %s changed since the last checkpoint, volume %d of its chain\n", d.Name, sizeText(d.Bytes), d.Chain)
		}
	}
}
