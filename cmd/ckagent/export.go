package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/export"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

type exportOptions struct {
	store        string
	format       string
	output       string
	xml          string
	paging       bool
	printCommand bool
}

func newExportCommand(a *app) *cobra.Command {
	var o exportOptions
	c := &cobra.Command{
		Use:   "export ID|VM --format FORMAT",
		Short: "Turn a checkpoint into a file that other tools read",
		Long: "Turn a checkpoint into a file that other tools read, on standard output or in a file that gets its\n" +
			"name when it is whole:\n" +
			"  qemu     migration stream that QEMU loads with -incoming\n" +
			"  libvirt  save image for virsh restore\n" +
			"  elf      core dump for gdb and crash, with the vCPUs' registers\n" +
			"  raw      guest RAM at its physical addresses\n" +
			"Every page is checked as it is read; damage ends the export with exit code 4.",
		Args: exactArgs(1, "a checkpoint or a VM"),
		RunE: func(c *cobra.Command, args []string) error { return runExport(c, a, &o, args[0]) },
	}
	storeFlag(c, &o.store)
	f := c.Flags()
	f.StringVar(&o.format, "format", "", strings.Join(export.Formats(), ", "))
	f.StringVarP(&o.output, "output", "o", "-", "file to write; - for standard output")
	f.StringVar(&o.xml, "xml", "", "format libvirt: file with the domain XML, instead of the recorded one")
	f.BoolVar(&o.paging, "paging", false, "format elf: memory by the vCPUs' virtual addresses instead of physical ones")
	f.BoolVar(&o.printCommand, "print-command", false, "print the command line that loads the qemu format, and export nothing")
	return c
}

// exportView is what --json says.
type exportView struct {
	Schema string `json:"schema"`
	*export.Summary
	Path    string   `json:"path,omitempty"`
	Command []string `json:"command,omitempty"` // that loads it
}

func runExport(c *cobra.Command, a *app, o *exportOptions, ref string) (err error) {
	eo, err := o.options()
	if err != nil {
		return err
	}
	img, err := openCheckpoint(c.Context(), a, o.store, ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	if o.printCommand {
		return o.print(a, img.Manifest())
	}
	if o.output == "-" {
		if isTerminal(a.out) {
			return problem.New(problem.Refused, "export", img.Manifest().ID, "standard output is a terminal").
				WithHint("send it into a pipe or a file, or name one: -o FILE")
		}
		// From here on the data has standard output to itself: an error as JSON in
		// the middle of it would be taken for memory.
		out := a.out
		a.out = a.err
		sum, err := export.Write(c.Context(), img.Reader, out, eo)
		if err != nil {
			return err
		}
		return o.report(a, a.err, img.Manifest(), sum)
	}
	if !a.json {
		eo.Progress = a.newBar("export").update
	}
	f, err := export.CreateFile(o.output)
	if err != nil {
		return err
	}
	sum, err := export.Write(c.Context(), img.Reader, f, eo)
	if err != nil {
		return errors.Join(err, f.Abort())
	}
	if err := f.Commit(); err != nil {
		return err
	}
	return o.report(a, a.out, img.Manifest(), sum)
}

func (o *exportOptions) options() (export.Options, error) {
	eo := export.Options{Format: export.Format(o.format), Paging: o.paging}
	switch {
	case o.printCommand && (o.format == "" || eo.Format == export.QEMU):
		eo.Format = export.QEMU
	case o.printCommand:
		return eo, usageError("--print-command is of format qemu")
	case o.format == "":
		return eo, usageError("--format is missing: one of %s", strings.Join(export.Formats(), ", "))
	case o.paging && eo.Format != export.ELF:
		return eo, usageError("--paging is of format elf")
	case o.xml != "" && eo.Format != export.Libvirt:
		return eo, usageError("--xml is of format libvirt")
	}
	if o.xml != "" {
		text, err := os.ReadFile(o.xml)
		if err != nil {
			return eo, usageError("--xml: %w", err)
		}
		eo.XML = string(text)
	}
	return eo, nil
}

// openCheckpoint opens the checkpoint that ref names for reading; a newer one that
// was passed over is named.
func openCheckpoint(ctx context.Context, a *app, dir, ref string) (*store.Image, error) {
	st, err := store.Open(dir)
	if err != nil {
		return nil, err
	}
	sel, err := st.Get(ctx, ref, store.GetOptions{})
	if err != nil {
		return nil, err
	}
	for _, s := range sel.Skipped {
		a.log.Warn("a newer checkpoint cannot be used", "id", s.ID, "because", s.Err)
	}
	return st.OpenImage(ctx, sel.Info.ID)
}

// command is what loads the stream: from the file, or from standard input.
func (o *exportOptions) command(m *image.Manifest) ([]string, error) {
	if o.output == "-" {
		return export.Command(m, "fd:0")
	}
	path, err := filepath.Abs(o.output)
	if err != nil {
		return nil, err
	}
	return export.Command(m, "exec:cat "+shellQuote(path))
}

func (o *exportOptions) print(a *app, m *image.Manifest) error {
	argv, err := o.command(m)
	if err != nil {
		return err
	}
	if a.json {
		a.print("export", exportView{Schema: schema("export"), Summary: &export.Summary{ID: m.ID, VM: m.VM, Format: export.QEMU}, Command: argv})
		return nil
	}
	fmt.Fprintln(a.out, shellLine(argv))
	return nil
}

// report says what was written, where it does not get into the data's way.
func (o *exportOptions) report(a *app, w io.Writer, m *image.Manifest, sum *export.Summary) error {
	v := exportView{Schema: schema("export"), Summary: sum}
	if o.output != "-" {
		v.Path = o.output
	}
	if sum.Format == export.QEMU {
		var err error
		if v.Command, err = o.command(m); err != nil {
			return err
		}
	}
	for _, d := range sum.Disks {
		a.log.Warn("the state belongs to a disk", "disk", d.Name, "image", d.Path, "advice", d.Advice())
	}
	if a.json {
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	fmt.Fprintf(w, "%s of VM %s as %s: %s\n", sum.ID, sum.VM, sum.Format, sizeText(sum.Bytes))
	if len(v.Command) > 0 {
		fmt.Fprintf(w, "load it with: %s\n", shellLine(v.Command))
	}
	for _, r := range sum.Map {
		fmt.Fprintf(w, "guest-physical %#x, %s of %s, at %#x\n", r.GPA, sizeText(r.Bytes), r.Block, r.Offset)
	}
	return nil
}
