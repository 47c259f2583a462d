package guest

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/problem"
)

// A release is the Debian release of this machine and where its packages are
// found, taken from the machine's own apt configuration.
type release struct {
	codename string   // such as bookworm
	sources  []source // of this release alone; other archives are left out
}

// source is one archive: the options apt needs for it (keys) and its address.
type source struct {
	options, uri string
	suite        string // such as bookworm-updates
}

// currentRelease reads os-release and apt's source lists.
func currentRelease() (release, error) {
	osRelease, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return release{}, problem.New(problem.Failed, "read", "/etc/os-release", "%w", err)
	}
	r := release{codename: osReleaseField(string(osRelease), "VERSION_CODENAME")}
	id := osReleaseField(string(osRelease), "ID")
	if id != "debian" || r.codename == "" {
		return release{}, problem.New(problem.Refused, "make a guest", "this machine",
			"it runs %q %q, not a Debian release", id, r.codename).WithHint("guests are built from Debian packages")
	}
	lists, _ := filepath.Glob("/etc/apt/sources.list.d/*")
	for _, path := range append([]string{"/etc/apt/sources.list"}, lists...) {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // apt ignores what is not there too
		}
		switch filepath.Ext(path) {
		case ".list":
			r.sources = append(r.sources, parseList(string(text), r.codename)...)
		case ".sources":
			r.sources = append(r.sources, parseSources(string(text), r.codename)...)
		}
	}
	if len(r.sources) == 0 {
		return release{}, problem.New(problem.Failed, "find package archives of", r.codename,
			"none in /etc/apt").WithHint("add the release's archive to /etc/apt/sources.list")
	}
	return r, nil
}

func osReleaseField(text, key string) string {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
			return strings.Trim(v, `"'`)
		}
	}
	return ""
}

// ours tells whether a suite belongs to the release: the release itself, its
// updates or its security archive.
func ours(suite, codename string) bool {
	return suite == codename || suite == codename+"-updates" || suite == codename+"-security"
}

var listLine = regexp.MustCompile(`^deb\s+(\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+(.*)$`)

// parseList reads the one-line format of sources.list(5).
func parseList(text, codename string) (out []source) {
	for line := range strings.Lines(text) {
		m := listLine.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil || !ours(m[3], codename) || !slices.Contains(strings.Fields(m[4]), "main") {
			continue
		}
		out = append(out, source{options: strings.Trim(strings.TrimSpace(m[1]), "[]"), uri: m[2], suite: m[3]})
	}
	return out
}

// parseSources reads the deb822 format of sources.list(5). Keys given inline
// (not as a file) are left to the machine's own keyrings.
func parseSources(text, codename string) (out []source) {
	for stanza := range strings.SplitSeq(text, "\n\n") {
		field := map[string]string{}
		for line := range strings.Lines(stanza) {
			if k, v, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, " ") {
				field[strings.ToLower(strings.TrimSpace(k))] = strings.TrimSpace(v)
			}
		}
		if !slices.Contains(strings.Fields(field["types"]), "deb") || field["enabled"] == "no" ||
			!slices.Contains(strings.Fields(field["components"]), "main") {
			continue
		}
		options := ""
		if key := field["signed-by"]; strings.HasPrefix(key, "/") {
			options = "signed-by=" + key
		}
		for _, uri := range strings.Fields(field["uris"]) {
			for _, suite := range strings.Fields(field["suites"]) {
				if ours(suite, codename) {
					out = append(out, source{options: options, uri: uri, suite: suite})
				}
			}
		}
	}
	return out
}

// apt runs apt with lists of its own in the cache: the machine's lists may be
// missing, old or lack the suite, and are not ours to refresh.
type apt struct {
	dir     string // etc/, lists/, archives/ and dpkg-status below it
	release release
}

// openApt prepares the private configuration. extra suites (such as backports)
// are looked for beside the release proper.
func openApt(extra ...string) (*apt, error) {
	r, err := currentRelease()
	if err != nil {
		return nil, err
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	var list strings.Builder
	for _, s := range r.sources {
		suites := []string{s.suite}
		if s.suite == r.codename {
			suites = append(suites, extra...)
		}
		for _, suite := range suites {
			fmt.Fprintf(&list, "deb [%s arch=amd64] %s %s main\n", s.options, s.uri, suite)
		}
	}
	a := &apt{dir: filepath.Join(cache, "apt-"+stamp([]byte(list.String()))), release: r}
	for _, d := range []string{"lists/partial", "archives/partial", "etc"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	return a, writeFile(filepath.Join(a.dir, "etc/sources.list"), []byte(list.String()), 0o644)
}

func (a *apt) options() []string {
	return []string{
		"-q", "-o", "Dir::Etc::SourceList=" + a.dir + "/etc/sources.list", "-o", "Dir::Etc::SourceParts=-",
		"-o", "Dir::Etc::Preferences=/dev/null", "-o", "Dir::Etc::PreferencesParts=-",
		"-o", "Dir::State::Lists=" + a.dir + "/lists", "-o", "Dir::Cache=" + a.dir, "-o", "Dir::Cache::Archives=" + a.dir + "/archives",
		"-o", "APT::Sandbox::User=", "-o", "Acquire::Languages=none", "-o", "Acquire::Retries=3",
		"-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
		"-o", "Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled=false",
		"-o", "Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled=false",
		"-o", "Debug::NoLocking=true",
	}
}

func (a *apt) run(ctx context.Context, dir, tool string, args ...string) ([]byte, error) {
	return run(ctx, dir, tool, append(a.options(), args...)...)
}

// refresh fetches the package lists; force does so even if they are there.
func (a *apt) refresh(ctx context.Context, force bool) error {
	unlock, err := lock(ctx, filepath.Join(a.dir, ".lock"))
	if err != nil {
		return err
	}
	defer unlock()
	done := filepath.Join(a.dir, "refreshed")
	if _, err := os.Stat(done); err == nil && !force {
		return nil
	}
	if _, err := a.run(ctx, "", "apt-get", "update"); err != nil {
		return problem.New(problem.Failed, "fetch package lists of", a.release.codename, "%w", err).
			WithHint("the first build of a guest needs the Debian archive this machine is configured with")
	}
	return writeFile(done, nil, 0o644)
}

// unpack downloads packages (each "name" or "name=version") and unpacks them
// all below dir.
func (a *apt) unpack(ctx context.Context, dir string, packages ...string) error {
	if err := a.refresh(ctx, false); err != nil {
		return err
	}
	debs, err := os.MkdirTemp(a.dir, "download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(debs)
	args := append([]string{"download"}, packages...)
	if _, err = a.run(ctx, debs, "apt-get", args...); err != nil {
		// Lists older than the archive name versions that are gone.
		if e := a.refresh(ctx, true); e != nil {
			return e
		}
		if _, err = a.run(ctx, debs, "apt-get", args...); err != nil {
			return problem.New(problem.Failed, "download", strings.Join(packages, " "), "%w", err)
		}
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil || len(files) == 0 {
		return problem.New(problem.Failed, "download", strings.Join(packages, " "), "apt-get left no package")
	}
	for _, deb := range files {
		if _, err := run(ctx, "", "dpkg-deb", "-x", deb, dir); err != nil {
			return err
		}
	}
	return nil
}

// dependency is the first dependency of pkg whose name matches.
func (a *apt) dependency(ctx context.Context, pkg string, match *regexp.Regexp) (string, error) {
	if err := a.refresh(ctx, false); err != nil {
		return "", err
	}
	out, err := a.run(ctx, "", "apt-cache", "depends", pkg)
	if err != nil {
		return "", err
	}
	for s := bufio.NewScanner(strings.NewReader(string(out))); s.Scan(); {
		if name, ok := strings.CutPrefix(strings.TrimSpace(s.Text()), "Depends: "); ok && match.MatchString(name) {
			return name, nil
		}
	}
	return "", problem.New(problem.NotFound, "find the dependency of", pkg, "none matches %v", match)
}

func writeFile(path string, data []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if _, err = tmp.Write(data); err == nil {
		err = tmp.Chmod(mode)
	}
	if e := tmp.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
