package plugins

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/ckagent/ckagent/agent/problem"
)

// DefaultDir is where policies are installed.
const DefaultDir = "/usr/local/lib/ckagent/policies"

// DirVariable is the environment variable that names another directory.
const DirVariable = "CKAGENT_POLICY_DIR"

const (
	sumSuffix     = ".sha256"
	commandPrefix = "ckagent-policy-"
	maxProgram    = 1 << 30 // bytes
	maxSums       = 64 << 10
)

// ErrChecksum is what the errors about a program match that is not the one that was
// installed.
var ErrChecksum = errors.New("the program is not the one that was installed")

// validName is what a policy may be called: a file name that needs no quoting.
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,63}$`)

// Registry is a directory of installed programs.
type Registry struct{ dir string }

// Program is an installed one.
type Program struct {
	Name   string
	Path   string
	SHA256 string // lower-case hex
}

// NewRegistry is the registry in a directory, which need not exist yet.
func NewRegistry(dir string) *Registry {
	if dir == "" {
		dir = os.Getenv(DirVariable)
	}
	if dir == "" {
		dir = DefaultDir
	}
	return &Registry{dir: dir}
}

// Dir is the directory.
func (r *Registry) Dir() string { return r.dir }

// open makes sure that only root can change what is in the directory, and returns it
// without symbolic links.
func (r *Registry) open() (string, error) {
	const op = "use policies of"
	dir, err := filepath.Abs(r.dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if errors.Is(err, os.ErrNotExist) {
		return "", problem.New(problem.NotFound, op, r.dir, "no policy is installed").WithHint("ckagent policy install PATH")
	}
	if err != nil {
		return "", problem.New(problem.Failed, op, r.dir, "%w", err)
	}
	for at := dir; ; at = filepath.Dir(at) {
		if err := onlyRoot(at, at != dir); err != nil {
			return "", problem.New(problem.Refused, op, r.dir, "%w", err).
				WithHint("chown root and chmod go-w: whoever can write there can run programs as root")
		}
		if at == filepath.Dir(at) {
			return dir, nil
		}
	}
}

// onlyRoot refuses what somebody else than root can change or replace. In a sticky
// directory on the way nobody can replace what is root's.
func onlyRoot(path string, onTheWay bool) error {
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !ok:
		return fmt.Errorf("%s has no owner", path)
	case sys.Uid != 0:
		return fmt.Errorf("%s belongs to user %d, not to root", path, sys.Uid)
	case st.Mode().Perm()&0o022 != 0 && !(onTheWay && st.Mode()&os.ModeSticky != 0):
		return fmt.Errorf("%s is writable by others (mode %v)", path, st.Mode().Perm())
	}
	return nil
}

// List returns what is installed, by name. A program that is not what was installed
// is left out of the list and in the error.
func (r *Registry) List() ([]Program, error) {
	dir, err := r.open()
	if problem.Is(err, problem.NotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list policies: %w", err)
	}
	var list []Program
	var errs []error
	for _, e := range entries {
		if !validName.MatchString(e.Name()) {
			continue // checksums, files on their way
		}
		p, err := r.Lookup(e.Name())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		list = append(list, p)
	}
	return list, errors.Join(errs...)
}

// Lookup finds a program by its name, or by its path in the directory, and checks it.
func (r *Registry) Lookup(ref string) (Program, error) {
	const op = "find policy"
	dir, err := r.open()
	if err != nil {
		return Program{}, err
	}
	name := ref
	if strings.Contains(ref, "/") {
		at, err := filepath.Abs(ref)
		if err == nil {
			at, err = filepath.EvalSymlinks(at)
		}
		if err != nil {
			return Program{}, problem.New(problem.NotFound, op, ref, "%w", err)
		}
		if filepath.Dir(at) != dir {
			return Program{}, problem.New(problem.Refused, op, ref, "programs are run from %s only", dir).
				WithHint("ckagent policy install %s", ref)
		}
		name = filepath.Base(at)
	}
	if !validName.MatchString(name) {
		return Program{}, problem.New(problem.Usage, op, ref, "a policy is named by lower-case letters, digits, - and _")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return Program{}, problem.New(problem.NotFound, op, ref, "it is not installed in %s", dir).
			WithHint("ckagent policy list shows what is; ckagent policy install PATH")
	}
	if err := onlyRoot(path, false); err != nil {
		return Program{}, problem.New(problem.Refused, op, ref, "%w", err)
	}
	// An install replaces the program and then forgets the checksum of the old one:
	// what does not match is looked at again.
	for range 3 {
		var sum string
		if sum, err = verify(path); err == nil {
			return Program{Name: name, Path: path, SHA256: sum}, nil
		}
	}
	code := problem.Failed
	if errors.Is(err, ErrChecksum) {
		code = problem.Integrity
	}
	return Program{}, problem.New(code, op, ref, "%w", err).WithHint("install it again: ckagent policy install PATH")
}

// verify returns the checksum of a program, which must be one that was recorded.
func verify(path string) (string, error) {
	recorded, err := readSums(path + sumSuffix)
	if err != nil {
		return "", err
	}
	f, err := openRegular(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum, err := sumOf(f)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	if !slices.Contains(recorded, sum) {
		return "", fmt.Errorf("%w: %s has SHA-256 %s, recorded is %s", ErrChecksum, path, sum, strings.Join(recorded, " or "))
	}
	return sum, nil
}

func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", path)
	}
	if err == nil && st.Size() > maxProgram {
		err = fmt.Errorf("%s has %d bytes, more than %d", path, st.Size(), maxProgram)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func sumOf(r io.Reader) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// readSums reads what sha256sum(1) would check.
func readSums(path string) ([]string, error) {
	f, err := openRegular(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: no checksum was recorded", ErrChecksum)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sums, err := parseSums(io.LimitReader(f, maxSums))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return sums, nil
}

func parseSums(r io.Reader) (sums []string, err error) {
	for sc := bufio.NewScanner(r); sc.Scan(); {
		sum, _, _ := strings.Cut(sc.Text(), " ")
		if b, err := hex.DecodeString(sum); err != nil || len(b) != sha256.Size {
			return nil, fmt.Errorf("%w: %.80q is no SHA-256", ErrChecksum, sc.Text())
		}
		sums = append(sums, strings.ToLower(sum))
	}
	if len(sums) == 0 {
		return nil, fmt.Errorf("%w: no checksum was recorded", ErrChecksum)
	}
	return sums, nil
}

// NameOf is what a program is called when it is installed: its file name without
// the prefix of commands and without an extension.
func NameOf(path string) string {
	base := strings.TrimPrefix(filepath.Base(path), commandPrefix)
	return strings.TrimSuffix(base, filepath.Ext(base))
}

// Install copies a program into the directory and records its checksum. A program of
// the same name is replaced; at every instant there is a whole one, and its checksum.
func (r *Registry) Install(path string) (Program, error) {
	const op = "install policy"
	name := NameOf(path)
	if !validName.MatchString(name) {
		return Program{}, problem.New(problem.Usage, op, path, "it would be called %q: want lower-case letters, digits, - and _", name)
	}
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return Program{}, problem.New(problem.Failed, op, path, "%w", err)
	}
	dir, err := r.open()
	if err != nil {
		return Program{}, err
	}
	p := Program{Name: name, Path: filepath.Join(dir, name)}
	if p.SHA256, err = install(path, p.Path); err != nil {
		return Program{}, problem.New(problem.Failed, op, path, "%w", err)
	}
	return p, nil
}

func install(from, to string) (sum string, err error) {
	in, err := openRegular(from)
	if err != nil {
		return "", err
	}
	defer in.Close()
	if st, err := in.Stat(); err != nil || st.Mode()&0o111 == 0 {
		return "", errors.Join(err, fmt.Errorf("%s is not executable", from))
	}
	h := sha256.New()
	program, err := write(to, io.TeeReader(in, h), 0o755)
	if err != nil {
		return "", err
	}
	defer os.Remove(program) // gone when it was renamed
	sum = hex.EncodeToString(h.Sum(nil))
	lines := sumLine(sum, to)
	before := bytes.NewBufferString(lines)
	if old, err := readSums(to + sumSuffix); err == nil {
		for _, s := range old {
			before.WriteString(sumLine(s, to))
		}
	}
	// Both checksums, the program, then its own alone.
	if err := replace(to+sumSuffix, before); err != nil {
		return "", err
	}
	if err := os.Rename(program, to); err != nil {
		return "", err
	}
	return sum, replace(to+sumSuffix, strings.NewReader(lines))
}

func sumLine(sum, path string) string { return sum + "  " + filepath.Base(path) + "\n" }

// replace gives a file new content, whole or not at all.
func replace(path string, content io.Reader) error {
	tmp, err := write(path, content, 0o644)
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// write makes a file beside path that holds the content for good.
func write(path string, content io.Reader, mode os.FileMode) (string, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".")
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}
