package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"
	"golang.org/x/sys/unix"
)

// TouchVerb is the hidden verb of the program that leads to TouchMain.
const TouchVerb = "__touch"

const pageBytes = 4096

// touchSpec tells a toucher what to do.
type touchSpec struct {
	Pages, Touches int
	Sequential     bool
	Raw            string // served by mapper.Handle from this file; empty: somebody else serves
}

type touchHello struct {
	FD   int
	Base uint64
}

type touchTimes struct {
	P50NS, P99NS, TotalNS float64
	Sum                   byte // of the bytes read: the reads are not for nothing
}

// TouchMain is a process with a userfaultfd that reads its pages one at a time and
// measures each read. With a file it serves itself by mapper.Handle, as a program
// built on userfaultfd-go does.
func TouchMain(arg string) error {
	var spec touchSpec
	if err := json.Unmarshal([]byte(arg), &spec); err != nil {
		return err
	}
	runtime.GOMAXPROCS(4) // the reader and the handler both block in the kernel
	mem, fd, start, err := mapper.Register(spec.Pages * pageBytes)
	if err != nil {
		return err
	}
	if spec.Raw != "" {
		f, err := os.Open(spec.Raw)
		if err != nil {
			return err
		}
		defer f.Close()
		go func() { // until the process ends: mapper.Handle has no other end
			if err := mapper.Handle(fd, start, f); err != nil {
				fmt.Fprintln(os.Stderr, "mapper.Handle:", err)
				os.Exit(1)
			}
		}()
	}
	enc := json.NewEncoder(os.Stdout)
	if err := enc.Encode(touchHello{int(fd), uint64(start)}); err != nil {
		return err
	}
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); errors.Is(err, io.EOF) {
		return nil // only its memory was wanted, not its reads
	} else if err != nil {
		return err
	}
	order := rand.New(rand.NewPCG(1, 2)).Perm(spec.Pages)
	if spec.Sequential {
		slices.Sort(order)
	}
	times := make([]float64, 0, spec.Touches)
	var sum byte
	begin := time.Now()
	for _, p := range order[:spec.Touches] {
		at := time.Now()
		sum += mem[p*pageBytes]
		times = append(times, float64(time.Since(at)))
	}
	total := float64(time.Since(begin))
	slices.Sort(times)
	return enc.Encode(touchTimes{times[len(times)/2], times[len(times)*99/100], total, sum})
}

// child is a process that waits for a byte before it does its work.
type child struct {
	cmd *exec.Cmd
	in  *os.File
	out *bufio.Reader
}

// startChild starts one; close ends it.
func startChild(ctx context.Context, env []string, name string, args ...string) (*child, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	c := &child{cmd: exec.CommandContext(ctx, name, args...), in: w}
	c.cmd.Stdin, c.cmd.Stderr = r, os.Stderr
	c.cmd.Env = append(os.Environ(), env...)
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := c.cmd.StdoutPipe()
	if err == nil {
		err = c.cmd.Start()
	}
	if err != nil {
		w.Close()
		return nil, err
	}
	c.out = bufio.NewReader(out)
	return c, nil
}

func (c *child) line() (string, error) {
	s, err := c.out.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("%s said nothing: %w", c.cmd.Path, err)
	}
	return strings.TrimSpace(s), nil
}

func (c *child) start() error {
	_, err := c.in.Write([]byte("g"))
	return err
}

func (c *child) close() {
	c.in.Close()
	_ = c.cmd.Process.Kill() // it may have ended by itself
	_ = c.cmd.Wait()
}

// startTouch starts a toucher and reads where its memory is.
func startTouch(ctx context.Context, spec touchSpec) (*child, touchHello, error) {
	var hello touchHello
	self, err := os.Executable()
	if err != nil {
		return nil, hello, err
	}
	arg, err := json.Marshal(spec)
	if err != nil {
		return nil, hello, err
	}
	// mapper.Handle ends on EINTR, which a preempting signal would cause.
	c, err := startChild(ctx, []string{"GODEBUG=asyncpreemptoff=1", "GOGC=off"}, self, TouchVerb, string(arg))
	if err != nil {
		return nil, hello, err
	}
	line, err := c.line()
	if err == nil {
		err = json.Unmarshal([]byte(line), &hello)
	}
	if err != nil {
		c.close()
		return nil, hello, err
	}
	return c, hello, nil
}

// touch lets it run and returns what it measured.
func (c *child) touch() (t touchTimes, err error) {
	if err := c.start(); err != nil {
		return t, err
	}
	line, err := c.line()
	if err != nil {
		return t, err
	}
	return t, json.Unmarshal([]byte(line), &t)
}

// keyValues reads cwp's output.
func keyValues(line string) (figures, error) {
	f := figures{}
	for word := range strings.FieldsSeq(line) {
		k, v, ok := strings.Cut(word, "=")
		if !ok {
			continue
		}
		if n, err := strconv.ParseFloat(v, 64); err == nil {
			f[k] = n
		}
	}
	if _, ok := f["total_ns"]; !ok {
		return nil, fmt.Errorf("no figures in %q", line)
	}
	return f, nil
}

// limit runs the C loop.
func (b *bench) limit(ctx context.Context, args ...string) (figures, error) {
	out, err := exec.CommandContext(ctx, b.cwp, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return nil, fmt.Errorf("cwp %s: %w", strings.Join(args, " "), err)
	}
	return keyValues(string(out))
}

// startTicks is when a process started: field 22 of /proc/PID/stat.
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 20 {
		return 0, fmt.Errorf("stat of pid %d: %q: %w", pid, s, unix.EINVAL)
	}
	return strconv.ParseUint(f[19], 10, 64)
}
