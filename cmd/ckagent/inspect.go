package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/store"
)

type inspectOptions struct{ store string }

func newInspectCommand(a *app) *cobra.Command {
	var o inspectOptions
	c := &cobra.Command{
		Use: "inspect ID|VM", Short: "Show all about one checkpoint but its pages", Args: exactArgs(1, "a checkpoint or a VM"),
		RunE: func(c *cobra.Command, args []string) error { return runInspect(c, a, o, args[0]) },
	}
	storeFlag(c, &o.store)
	return c
}

type fileView struct {
	Name      string `json:"name"`
	Bytes     int64  `json:"size_bytes"`
	DiskBytes int64  `json:"disk_bytes"`
}

func runInspect(c *cobra.Command, a *app, o inspectOptions, ref string) error {
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	in, err := st.Inspect(c.Context(), ref)
	if err != nil {
		return err
	}
	if err := notDamaged(in.Info); err != nil {
		return err
	}
	files := make([]fileView, 0, len(in.Files))
	for _, f := range in.Files {
		files = append(files, fileView(f))
	}
	disks := chainViews(c.Context(), st, in.Manifest)
	if a.json {
		a.print("checkpoint", struct {
			Schema string `json:"schema"`
			checkpointView
			Files    []fileView      `json:"files"`
			Disks    []chainView     `json:"disks"`
			Manifest *image.Manifest `json:"manifest"`
		}{schema("inspect"), viewOf(in.Info), files, disks, in.Manifest})
		return nil
	}
	printManifest(a, in.Manifest)
	for _, f := range files {
		fmt.Fprintf(a.out, "file      %-14s %12d bytes, %d on disk\n", f.Name, f.Bytes, f.DiskBytes)
	}
	printChains(a, disks)
	return nil
}

func printManifest(a *app, m *image.Manifest) {
	p := func(what, format string, args ...any) {
		fmt.Fprintf(a.out, "%-9s %s\n", what, fmt.Sprintf(format, args...))
	}
	p("id", "%s", m.ID)
	p("vm", "%s", m.VM)
	p("taken", "%s, mode %s, engine %s, pause %s, total %s", m.CreatedAt.Local().Format(time.RFC3339), m.Mode, m.Engine,
		durationText(time.Duration(m.Stats.PauseNS)), durationText(time.Duration(m.Stats.TotalNS)))
	p("parent", "%s", dash(m.Parent))
	if m.InheritedBytes() > 0 {
		p("chain", "%d steps; %s in segments of other checkpoints", m.Depth, sizeText(m.InheritedBytes()))
	}
	p("qemu", "%s %s (%s)", m.QEMU.BinaryPath, m.QEMU.Version, dash(m.QEMU.Package))
	p("machine", "%s, accel %s, %d vCPUs, CPU %s, -rtc %s", m.Machine.Type, m.Machine.Accel, m.Machine.VCPUs,
		dash(m.Machine.CPUModel), dash(m.Machine.RTC))
	p("ram", "%s in %d pages, %d of them zero, %d captured by faults; stored %s", sizeText(m.Stats.RAMBytes),
		m.Stats.Pages, m.Stats.ZeroPages, m.Stats.CapturedPages, sizeText(m.Stats.StoredBytes))
	for _, s := range m.Segments {
		if s.Owner != "" {
			p("from", "%s%s: %d pages in %s of %s", s.Owner, map[bool]string{true: " of VM " + s.VM}[s.VM != ""], s.Pages, sizeText(s.Bytes), s.Kind)
		}
	}
	for _, b := range m.Blocks {
		p("block", "%-24s %10s used, %10s mapped, %s%s", b.Name, sizeText(b.UsedBytes), sizeText(b.TotalBytes), b.Backing,
			map[bool]string{true: ", guest RAM"}[b.Main])
	}
	p("command", "%q", m.Machine.Argv)
	if len(m.Machine.Redacted) > 0 {
		p("secrets", "%q are asked for on restore", m.Machine.Redacted)
	}
}
