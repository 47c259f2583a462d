package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/store"
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
		case d.Method == image.DiskSnapshot:
			fmt.Fprintf(a.out, "disk %s: kept as a snapshot inside %s, which must stay\n", d.Name, d.Path)
		case d.Chain == 1:
			fmt.Fprintf(a.out, "disk %s: %s copied whole\n", d.Name, sizeText(d.Bytes))
		default:
			fmt.Fprintf(a.out, "disk %s: %s changed since the last checkpoint, volume %d of its chain\n", d.Name, sizeText(d.Bytes), d.Chain)
		}
	}
}

// chainView is a disk with the files that hold it, as we and as qemu-img see them.
type chainView struct {
	diskView
	Dir     string          `json:"dir,omitempty"` // of the volumes
	Volumes []image.Volume  `json:"volumes"`
	QEMUImg json.RawMessage `json:"qemu_img,omitempty"` // qemu-img info --backing-chain --output=json
	text    string
}

// chainViews asks qemu-img about every chain. That it is missing or fails is said
// where its answer would be: inspect shows what there is.
func chainViews(ctx context.Context, st *store.Store, m *image.Manifest) []chainView {
	out := []chainView{}
	for i, d := range diskViews(m) {
		v := chainView{diskView: d, Volumes: m.Disks[i].Volumes}
		if d.Volume != "" {
			v.Dir = st.VolumeDir(m.VM)
			v.ask(ctx, filepath.Join(v.Dir, d.Volume))
		}
		out = append(out, v)
	}
	return out
}

func (v *chainView) ask(ctx context.Context, path string) {
	args := []string{"info", "--force-share", "--backing-chain", "-f", "qcow2"}
	text, err := exec.CommandContext(ctx, "qemu-img", append(args, path)...).CombinedOutput()
	v.text = string(text)
	if err != nil {
		v.text += fmt.Sprintf("qemu-img: %v\n", err)
		return
	}
	raw, err := exec.CommandContext(ctx, "qemu-img", append(args, "--output=json", path)...).Output()
	if err == nil && json.Valid(raw) {
		v.QEMUImg = bytes.TrimSpace(raw)
	}
}

func printChains(a *app, disks []chainView) {
	for _, d := range disks {
		fmt.Fprintf(a.out, "disk      %s (%s, %s, %s): %s\n", d.Name, d.Path, d.Format, sizeText(d.SizeBytes), d.Method)
		for _, v := range d.Volumes {
			fmt.Fprintf(a.out, "volume    %s, %s, %v\n", filepath.Join(d.Dir, v.Name), sizeText(v.Bytes), v.Checksum)
		}
		for line := range strings.Lines(d.text) {
			fmt.Fprintf(a.out, "qemu-img  %s", line)
		}
	}
}
