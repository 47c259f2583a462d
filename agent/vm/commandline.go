package vm

import (
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/problem"
)

// CommandLine is what a command line alone says of a machine that cannot be asked.
type CommandLine struct {
	Argv    []string // argv[0] first, secrets replaced by placeholders
	Secrets []Secret // to be asked for again
	Name    string
	UUID    string
	Accel   string   // the first one named; tcg where none is, as QEMU does
	CPU     string   // value of -cpu
	RTC     string   // value of -rtc
	Manager string   // libvirt, proxmox: who started it
	RAM     []string // ids of memory backends; the machine's default backend has none here
	Disks   []string // options that name images the guest may write
}

// ReadCommandLine takes a command line apart, argv[0] first. How the machine came by
// its first state (-incoming, -loadvm, -S) is left out.
func ReadCommandLine(argv []string) (CommandLine, error) {
	var c CommandLine
	if len(argv) < 2 {
		return c, problem.New(problem.Usage, "read command line", "", "want QEMU and its arguments, got %d words", len(argv))
	}
	opts, err := cmdline.Parse(argv[1:])
	if err != nil {
		return c, problem.New(problem.Usage, "read command line", argv[0], "%w", err)
	}
	kept := opts[:0]
	for _, o := range opts {
		if o.Name != "incoming" && o.Name != "loadvm" && o.Name != "S" {
			kept = append(kept, o)
		}
	}
	r := &redactor{}
	redacted := r.options(kept)
	c.Argv = append([]string{argv[0]}, cmdline.Render(redacted)...)
	c.Secrets, c.Manager = r.secrets, managerOf(kept)
	accel := ""
	for _, o := range redacted {
		if writableImage(o) {
			c.Disks = append(c.Disks, "-"+o.Name+" "+o.Value)
		}
		switch o.Name {
		case "uuid":
			c.UUID = o.Value
		case "cpu":
			c.CPU = o.Value
		case "rtc":
			c.RTC = o.Value
		case "enable-kvm":
			accel = "kvm"
		}
		kv, err := o.KeyVal()
		if err != nil {
			continue
		}
		get := func(key string) string { v, _ := kv.Get(key); return v }
		switch o.Name {
		case "name":
			c.Name = get("guest")
		case "machine", "M", "accel":
			if a, _, _ := strings.Cut(get("accel"), ":"); a != "" && accel == "" {
				accel = a
			}
		case "object":
			if strings.HasPrefix(get("qom-type"), "memory-backend-") {
				c.RAM = append(c.RAM, get("id"))
			}
		}
	}
	if c.Accel = accel; accel == "" {
		c.Accel = "tcg"
	}
	return c, nil
}

// writableImage recognises options that give the guest a disk to write to.
func writableImage(o cmdline.Option) bool {
	switch o.Name {
	case "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock":
		return true
	case "drive", "blockdev":
	default:
		return false
	}
	kv, err := o.KeyVal()
	if err != nil {
		return false
	}
	is := func(key string, values ...string) bool {
		v, ok := kv.Get(key)
		return ok && slices.Contains(values, v)
	}
	if o.Name == "drive" {
		_, file := kv.Get("file")
		return file && !is("readonly", "on", "yes", "true") && !is("read-only", "on", "yes", "true") &&
			!is("if", "pflash") && !is("media", "cdrom") && !is("snapshot", "on")
	}
	return !is("read-only", "on", "yes", "true") && !is("driver", "null-co", "null-aio")
}
