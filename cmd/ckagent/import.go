package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/ingest"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
)

type importOptions struct {
	store    string
	name     string
	argvFrom string
	compress string
}

func newImportCommand(a *app) *cobra.Command {
	var o importOptions
	c := &cobra.Command{
		Use:   "import FILE|- [--argv-from PID|FILE] [-- QEMU ARGUMENTS]",
		Short: "Make a checkpoint of a migration stream that QEMU or libvirt wrote",
		Long: "Make a checkpoint of a migration stream that QEMU wrote (migrate exec:cat>FILE, migrate file:FILE) or\n" +
			"of a libvirt save image. The stream does not say how QEMU was started: name a process or a file that\n" +
			"has the command line, or give it after --. Disks are not in a stream.",
		RunE: func(c *cobra.Command, args []string) error { return runImport(c, a, &o, args) },
	}
	storeFlag(c, &o.store)
	f := c.Flags()
	f.StringVar(&o.name, "name", "", "name of the VM in the store (default: QEMU's -name)")
	f.StringVar(&o.argvFrom, "argv-from", "", "QEMU's command line: a pid, or a file (shell words, a JSON array, /proc/PID/cmdline, libvirt's log)")
	f.StringVar(&o.compress, "compress", "none", "none, s2 or zstd")
	return c
}

// maxArgvFile bounds a file with a command line.
const maxArgvFile = 4 << 20

func runImport(c *cobra.Command, a *app, o *importOptions, args []string) (err error) {
	file, argv, err := splitArgs(c, args, "one FILE, or - for standard input")
	if err != nil {
		return err
	}
	opts := ingest.Options{Name: o.name, Compress: o.compress, UID: os.Geteuid(), GID: os.Getegid(), At: time.Now()}
	if err := o.commandLine(&opts, argv); err != nil {
		return err
	}
	in := os.Stdin
	if file != "-" {
		if in, err = os.Open(file); err != nil {
			code := problem.Failed
			if errors.Is(err, os.ErrNotExist) {
				code = problem.NotFound
			}
			return problem.New(code, "import", file, "%w", err)
		}
		defer in.Close()
		st, err := in.Stat()
		if err != nil {
			return problem.New(problem.Failed, "import", file, "%w", err)
		}
		if st.Mode().IsRegular() {
			opts.At = st.ModTime()
		}
	} else if isTerminal(in) {
		return usageError("standard input is a terminal: name a file, or send the stream into a pipe")
	}
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	res, err := ingest.Import(c.Context(), in, st, opts)
	if err != nil {
		return err
	}
	return printImport(a, res)
}

func printImport(a *app, res *ingest.Result) error {
	m := res.Manifest
	if a.json {
		a.print("import", struct {
			Schema      string   `json:"schema"`
			ID          string   `json:"id"`
			VM          string   `json:"vm"`
			Machine     string   `json:"machine"`
			RAMBytes    uint64   `json:"ram_bytes"`
			Pages       uint64   `json:"pages"`
			ZeroPages   uint64   `json:"zero_pages"`
			ResentPages uint64   `json:"resent_pages"`
			UnsentPages uint64   `json:"unsent_pages"`
			StoredBytes uint64   `json:"stored_bytes"`
			TotalNS     int64    `json:"total_ns"`
			Notes       []string `json:"notes"`
		}{schema("import"), m.ID, m.VM, m.Machine.Type, m.Stats.RAMBytes, m.Stats.Pages, m.Stats.ZeroPages,
			res.ResentPages, res.UnsentPages, m.Stats.StoredBytes, m.Stats.TotalNS, append([]string{}, res.Notes...)})
		return nil
	}
	for _, n := range res.Notes {
		a.log.Warn(n)
	}
	fmt.Fprintf(a.out, "%s of VM %s: %s, %s of RAM, %s stored\n", m.ID, m.VM, m.Machine.Type, sizeText(m.Stats.RAMBytes), sizeText(m.Stats.StoredBytes))
	return nil
}

// commandLine finds how QEMU is to be started.
func (o *importOptions) commandLine(to *ingest.Options, argv []string) (err error) {
	if (o.argvFrom == "") == (len(argv) == 0) {
		return usageError("want QEMU's command line: either --argv-from or after --")
	}
	if to.Cwd, err = os.Getwd(); err != nil {
		return problem.New(problem.Failed, "import", "", "%w", err)
	}
	if pid, perr := strconv.Atoi(o.argvFrom); perr == nil {
		p, err := vm.OpenProcess(pid)
		if err != nil {
			return err
		}
		argv, to.Binary, to.UID, to.GID, to.Groups, to.Cwd = p.Argv, p.Exe, p.UID, p.GID, p.Groups, p.Cwd
		if err := p.Close(); err != nil {
			return err
		}
	} else if o.argvFrom != "" {
		if argv, err = readArgv(o.argvFrom); err != nil {
			return err
		}
	}
	if to.Command, err = vm.ReadCommandLine(argv); err != nil {
		return err
	}
	if to.Binary == "" {
		if to.Binary, err = exec.LookPath(argv[0]); err == nil {
			to.Binary, err = filepath.Abs(to.Binary)
		}
		if err != nil {
			return usageError("the QEMU of the command line: %w", err)
		}
	}
	return nil
}

// readArgv reads a command line from a file: words separated by zero bytes, a JSON
// array, or shell words, in front of which variables may be set; libvirt's log of a
// domain (/var/log/libvirt/qemu/NAME.log) is such a file.
func readArgv(path string) ([]string, error) {
	bad := func(err error) error { return usageError("--argv-from %s: %w", path, err) }
	f, err := os.Open(path)
	if err != nil {
		return nil, bad(err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxArgvFile+1))
	if err != nil {
		return nil, bad(err)
	}
	if len(raw) > maxArgvFile {
		return nil, bad(errors.New("too long for a command line"))
	}
	var argv []string
	switch text := strings.TrimSpace(lastStart(string(raw))); {
	case bytes.IndexByte(raw, 0) >= 0:
		argv = strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
	case strings.HasPrefix(text, "["):
		err = json.Unmarshal(raw, &argv)
	default:
		argv, err = splitWords(text)
		for len(argv) > 0 && isAssignment(argv[0]) {
			argv = argv[1:]
		}
	}
	if err != nil {
		return nil, bad(err)
	}
	return argv, nil
}

// lastStart is the command line that libvirt noted last in a domain's log; any other
// text stays as it is.
func lastStart(text string) string {
	const mark = ": starting up libvirt version: "
	i := strings.LastIndex(text, mark)
	if i < 0 {
		return text
	}
	_, text, _ = strings.Cut(text[i:], "\n")
	var command strings.Builder
	for line := range strings.Lines(text) {
		command.WriteString(line)
		if !strings.HasSuffix(line, "\\\n") {
			break
		}
	}
	return command.String()
}

// isAssignment recognises NAME=value in front of a command.
func isAssignment(word string) bool {
	name, _, ok := strings.Cut(word, "=")
	return ok && name != "" && strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_0123456789") == ""
}
