package proving

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/flock"
	"github.com/ckagent/ckagent/agent/selfexe"
)

// Path is a way by which a guest's writes reach its RAM, and what came of its trial.
type Path struct {
	Accel  string `json:"accel"`
	RAM    string `json:"ram"` // anonymous, shared
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Pages  uint64 `json:"pages"` // captured in the kernel, and compared
	TookNS int64  `json:"took_ns"`
}

// Report is what is known about this host.
type Report struct {
	Schema string `json:"schema"`
	BootID string `json:"boot_id"`
	Binary string `json:"binary"` // which one was tried
	Paths  []Path `json:"paths"`
}

const schema = "ckagent.proving/v1"

var kindNames = map[source.Kind]string{source.Anonymous: "anonymous", source.Shared: "shared", source.PrivateFile: "private file"}

// dir is where the answers stay until the next boot.
const dir = "/run/ckagent"

// fileOf has one file for each binary: two of them may be at work on one host, during an
// upgrade for instance, and each needs its answer at every checkpoint.
func fileOf(dir, binary string) string {
	sum := sha256.Sum256([]byte(binary))
	return filepath.Join(dir, fmt.Sprintf("proving-%x.json", sum[:8]))
}

// Load returns what is known, or finds it out. helper is the command line that leads to
// our own binary;
// nil: this very binary.
func Load(ctx context.Context, helper []string) (*Report, error) { return loadFrom(ctx, dir, helper) }

func loadFrom(ctx context.Context, dir string, helper []string) (*Report, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	helper = selfexe.Or(helper)
	binary, err := identity(helper[0])
	if err != nil {
		return nil, err
	}
	file := fileOf(dir, binary)
	known := func() *Report {
		if r, err := read(file); err == nil && r.Schema == schema && r.BootID == boot && r.Binary == binary {
			return r
		}
		return nil
	}
	if r := known(); r != nil {
		return r, nil
	}
	// One trial at a time: several would keep each other from the processors, and those
	// who wait for it need none of their own.
	lock, err := turn(ctx, file+".lock")
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if r := known(); r != nil {
		return r, nil
	}
	r := &Report{Schema: schema, BootID: boot, Binary: binary}
	for _, accel := range []string{"tcg", "kvm"} {
		for _, kind := range []source.Kind{source.Anonymous, source.Shared} {
			r.Paths = append(r.Paths, try(ctx, helper, wayOf(accel, kind)))
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
		}
	}
	// Without the file the next one tries again.
	_ = write(file, r)
	return r, nil
}

// turnWait is for another process's trial, which takes a few seconds, and half a minute on
// a busy host.
const turnWait = 2 * time.Minute

// turn waits until no other process makes a trial. Closing the file ends the lock.
func turn(ctx context.Context, path string) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, turnWait)
	defer cancel()
	f, err := flock.Wait(ctx, path, nil)
	if err != nil {
		return nil, fmt.Errorf("wait for another process's test of the engine: %w", err)
	}
	return f, nil
}

func try(ctx context.Context, helper []string, w way) Path {
	begin := time.Now()
	p := Path{Accel: w.accel, RAM: kindNames[w.kind]}
	var err error
	p.Pages, err = trial(ctx, helper, w)
	p.TookNS = time.Since(begin).Nanoseconds()
	if err != nil {
		p.Detail = err.Error()
		return p
	}
	p.OK, p.Detail = true, fmt.Sprintf("%d pages copied in the kernel before they were written, all right", p.Pages)
	return p
}

// Proven returns nil if the engine can be trusted for an accelerator and a kind of RAM,
// else why not.
func (r *Report) Proven(accel string, ram source.Kind) error {
	for _, p := range r.Paths {
		if p.Accel != accel || p.RAM != kindNames[ram] {
			continue
		}
		if p.OK {
			return nil
		}
		return fmt.Errorf("its test on this host failed for accelerator %s and %s RAM: %s", accel, p.RAM, p.Detail)
	}
	return fmt.Errorf("it has no test for accelerator %s and %s RAM", accel, kindNames[ram])
}

// Proven is Load and Report.Proven in one, as capture.Options asks for it.
func Proven(helper []string) func(ctx context.Context, accel string, ram source.Kind) error {
	return func(ctx context.Context, accel string, ram source.Kind) error {
		r, err := Load(ctx, helper)
		if err != nil {
			return err
		}
		return r.Proven(accel, ram)
	}
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

// identity names a binary by what it was built from; copies have the same name.
func identity(path string) (string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", fmt.Errorf("our own binary %s: %w", path, err)
	}
	defer f.Close()
	s := f.Section(".note.go.buildid")
	if s == nil {
		return "", fmt.Errorf("our own binary %s has no build id", path)
	}
	b, err := s.Data()
	if err != nil {
		return "", fmt.Errorf("our own binary %s: build id: %w", path, err)
	}
	return hex.EncodeToString(b), nil
}

func read(file string) (*Report, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var r Report
	return &r, json.Unmarshal(b, &r)
}

// write replaces the file in one step.
func write(file string, r *Report) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".proving-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
