// Package debian gets binary packages of any suite and architecture out of
// the Debian archive without installing them and without touching the
// system's own apt: the tests take kernels, kernel headers and programs from
// it.
//
// It drives apt-get with a configuration, sources list and state of its own
// under a cache directory. The archive's address is the one that this
// machine's apt sources name. Every list and package is verified against the
// machine's Debian keyring, which has to be as new as the suites asked for.
package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// listsAge is how old package lists may be before Find fetches them again.
const listsAge = 24 * time.Hour

// indexName is the file beside apt's state that says what the lists hold. Its
// time is that of the last update.
const indexName = "index"

// keyrings are where Debian has kept its archive keys, newest place first.
var keyrings = []string{
	"/usr/share/keyrings/debian-archive-keyring.pgp",
	"/usr/share/keyrings/debian-archive-keyring.gpg",
}

// Archive is the Debian archive as seen through one cache directory. Several
// processes may use the same directory at the same time.
type Archive struct {
	dir     string
	uris    []string
	keyring string
}

// Package is one version of a binary package that a suite lists.
type Package struct {
	Name    string
	Version string
	Arch    string // as the package says it: an architecture or "all"
	Suite   string

	listArch string // the architecture whose list names it
}

func (p Package) String() string {
	return fmt.Sprintf("%s %s (%s, %s)", p.Name, p.Version, p.Arch, p.Suite)
}

// Open returns the archive that this machine's apt sources name. Lists and
// packages are kept in cacheDir; an empty string means uffd/debian in the
// user's cache directory.
func Open(cacheDir string) (*Archive, error) {
	for _, tool := range []string{"apt-get", "dpkg-deb", "tar"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("debian: %s is missing: packages can only be fetched on a Debian system: %w", tool, err)
		}
	}
	i := slices.IndexFunc(keyrings, func(name string) bool {
		_, err := os.Stat(name)
		return err == nil
	})
	if i < 0 {
		return nil, errors.New("debian: no Debian archive keyring on this machine: install debian-archive-keyring")
	}
	uris, err := machineArchives("/etc/apt")
	if err != nil {
		return nil, fmt.Errorf("debian: %w", err)
	}
	if cacheDir == "" {
		userCache, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("debian: %w", err)
		}
		cacheDir = filepath.Join(userCache, "uffd", "debian")
	}
	// apt takes relative paths as relative to its own root.
	if cacheDir, err = filepath.Abs(cacheDir); err != nil {
		return nil, fmt.Errorf("debian: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(cacheDir, "debs"), 0o755); err != nil {
		return nil, fmt.Errorf("debian: %w", err)
	}
	return &Archive{dir: cacheDir, uris: uris, keyring: keyrings[i]}, nil
}

// Find returns the packages of main whose name matches, newest version first;
// equal versions come in the order of suites. A suite that lacks the
// architecture contributes none. The error names the suites whose lists could
// not be had; the packages of the others are returned all the same. Finding
// nothing at all is an error too.
func (a *Archive) Find(ctx context.Context, suites []string, arch string, name *regexp.Regexp) ([]Package, error) {
	unlock, err := lock(filepath.Join(a.dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("debian: %w", err)
	}
	defer unlock()
	var found []Package
	var errs []error
	for _, suite := range suites {
		packages, err := a.packages(ctx, suite, arch, name)
		if err != nil {
			errs = append(errs, fmt.Errorf("debian: lists of %s for %s: %w", suite, arch, err))
		}
		found = append(found, packages...)
	}
	if len(found) == 0 && len(errs) == 0 {
		return nil, fmt.Errorf("debian: no package matches %q for %s in %s", name, arch, strings.Join(suites, ", "))
	}
	slices.SortStableFunc(found, func(p, q Package) int { return CompareVersions(q.Version, p.Version) })
	return found, errors.Join(errs...)
}

// Download returns the path of the package's .deb in the cache, fetching it
// if it is not there yet.
func (a *Archive) Download(ctx context.Context, p Package) (string, error) {
	unlock, err := lock(filepath.Join(a.dir, "lock"))
	if err != nil {
		return "", fmt.Errorf("debian: %w", err)
	}
	defer unlock()
	fileName := fmt.Sprintf("%s_%s_%s.deb", p.Name, strings.ReplaceAll(p.Version, ":", "%3a"), p.Arch)
	deb := filepath.Join(a.dir, "debs", fileName)
	if _, err := os.Stat(deb); err == nil {
		return deb, nil
	}
	// apt-get writes to the working directory, under a name of its choice.
	tmp, err := os.MkdirTemp(a.dir, "download")
	if err != nil {
		return "", fmt.Errorf("debian: %w", err)
	}
	defer os.RemoveAll(tmp)
	state := a.stateDir(p.Suite, p.listArch)
	if out, err := aptGet(ctx, state, tmp, "download", p.Name+"="+p.Version); err != nil {
		// The lists may name what the archive no longer has: have them renewed.
		os.Remove(filepath.Join(state, indexName))
		return "", fmt.Errorf("debian: download %s: %w\n%s", p, err, out)
	}
	got, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(got) != 1 {
		return "", fmt.Errorf("debian: download %s: apt-get left %d packages instead of 1", p, len(got))
	}
	if err := os.Rename(got[0], deb); err != nil {
		return "", fmt.Errorf("debian: download %s: %w", p, err)
	}
	return deb, nil
}

// DownloadFirst downloads the first of packages that can be had: archives
// list packages that they no longer serve. With what Find returned that is
// the newest one.
func (a *Archive) DownloadFirst(ctx context.Context, packages []Package) (Package, string, error) {
	errs := []error{errors.New("debian: none of the packages can be downloaded")}
	for _, p := range packages {
		deb, err := a.Download(ctx, p)
		if err == nil {
			return p, deb, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return Package{}, "", errors.Join(errs...)
}

// Extract unpacks the files of a .deb whose path matches one of patterns, or
// all of them, into destDir. Paths begin with "./"; a "*" matches slashes too,
// and a directory stands for all that is in it. A pattern that matches
// nothing is an error.
func Extract(ctx context.Context, debPath, destDir string, patterns ...string) error {
	if err := os.MkdirAll(destDir, 0o755); err != nil {
		return fmt.Errorf("debian: %w", err)
	}
	var unpackErr, tarErr bytes.Buffer
	unpack := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", debPath)
	unpack.Stderr = &unpackErr
	// The package's owners are not for us to make, and a umask is for us to keep.
	tar := exec.CommandContext(ctx, "tar", append([]string{"-x", "--no-same-owner", "--no-same-permissions",
		"-C", destDir, "--wildcards", "--"}, patterns...)...)
	tar.Stderr = &tarErr
	pipe, err := unpack.StdoutPipe()
	if err != nil {
		return fmt.Errorf("debian: %w", err)
	}
	tar.Stdin = pipe
	if err := unpack.Start(); err != nil {
		return fmt.Errorf("debian: unpack %s: %w", debPath, err)
	}
	errTar := tar.Run()
	io.Copy(io.Discard, pipe) // so that dpkg-deb ends even if tar ended first
	errUnpack := unpack.Wait()
	if err := errors.Join(errUnpack, errTar); err != nil {
		return fmt.Errorf("debian: unpack %s: %w\n%s%s", debPath, err, &unpackErr, &tarErr)
	}
	return nil
}

// stateDir is where apt's state for one suite and architecture lives. Each
// has its own, so that an update fetches no more than was asked for and one
// broken suite does not stop the others.
func (a *Archive) stateDir(suite, arch string) string {
	return filepath.Join(a.dir, "apt", suite+"_"+arch)
}

// packages returns the packages of one suite whose name matches.
func (a *Archive) packages(ctx context.Context, suite, arch string, name *regexp.Regexp) ([]Package, error) {
	index := filepath.Join(a.stateDir(suite, arch), indexName)
	info, err := os.Stat(index)
	if err != nil || time.Since(info.ModTime()) > listsAge {
		// An old index is better than none, as when the network is away.
		if updateErr := a.update(ctx, suite, arch); updateErr != nil && err != nil {
			return nil, updateErr
		}
	}
	text, err := os.ReadFile(index)
	if err != nil {
		return nil, err
	}
	var found []Package
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return nil, fmt.Errorf("%s is damaged: remove it", index)
		}
		if name.MatchString(fields[0]) {
			found = append(found, Package{Name: fields[0], Version: fields[1], Arch: fields[2], Suite: suite, listArch: arch})
		}
	}
	return found, nil
}

// update fetches the lists of a suite and writes the index of what they hold,
// which is empty if the suite lacks the architecture.
func (a *Archive) update(ctx context.Context, suite, arch string) error {
	state := a.stateDir(suite, arch)
	if err := os.MkdirAll(state, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(state, "apt.conf"), aptConf(state, arch), 0o644); err != nil {
		return err
	}
	var errs []error
	for _, uri := range a.uris {
		source := fmt.Sprintf("deb [arch=%s target=Packages signed-by=%s] %s %s main\n", arch, a.keyring, uri, suite)
		if err := os.WriteFile(filepath.Join(state, "sources.list"), []byte(source), 0o644); err != nil {
			return err
		}
		out, updateErr := aptGet(ctx, state, "", "update")
		lists, err := filepath.Glob(filepath.Join(state, "lists", "*_Packages*"))
		if err != nil {
			return err
		}
		// A failed update may have left what matters all the same.
		if updateErr == nil || len(lists) > 0 {
			return writeIndex(ctx, filepath.Join(state, indexName), lists)
		}
		errs = append(errs, fmt.Errorf("apt-get update: %w\n%s", updateErr, out))
	}
	return errors.Join(errs...)
}

// writeIndex writes a line "name version architecture" for each package of
// the lists.
func writeIndex(ctx context.Context, index string, lists []string) error {
	var lines bytes.Buffer
	for _, list := range lists {
		// The lists stay as compressed as the archive has them, and only apt
		// knows how.
		cat := exec.CommandContext(ctx, "/usr/lib/apt/apt-helper", "cat-file", list)
		var stderr bytes.Buffer
		cat.Stderr = &stderr
		text, err := cat.Output()
		if err != nil {
			return fmt.Errorf("read %s: %w\n%s", list, err, &stderr)
		}
		for _, p := range parseList(text) {
			fmt.Fprintln(&lines, p.Name, p.Version, p.Arch)
		}
	}
	tmp := index + ".tmp"
	if err := os.WriteFile(tmp, lines.Bytes(), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, index)
}

// aptConf keeps apt-get away from the system's state. It is read after the
// system's own configuration, which stays in force for what an administrator
// sets for the network, like a proxy.
func aptConf(state, arch string) []byte {
	return fmt.Appendf(nil, `APT::Architecture "%[2]s";
#clear APT::Architectures;
APT::Architectures "%[2]s";
APT::Sandbox::User "root"; // the sandbox's user cannot write here
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::GzipIndexes "true";
Acquire::Languages "none";
Acquire::PDiffs "false";
Acquire::Retries "2";
Dir::State "%[1]s";
Dir::State::lists "%[1]s/lists";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s";
Dir::Cache::archives "%[1]s/archives";
Dir::Cache::pkgcache ""; // several times larger than the lists
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
`, state, arch)
}

// aptGet runs apt-get with the configuration in state, in the directory dir,
// and returns all that it printed.
func aptGet(ctx context.Context, state, dir string, args ...string) ([]byte, error) {
	for _, name := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(state, name), 0o755); err != nil {
			return nil, err
		}
	}
	// No package is installed, as far as this state knows.
	if err := os.WriteFile(filepath.Join(state, "status"), nil, 0o644); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "-c", filepath.Join(state, "apt.conf")}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return cmd.CombinedOutput()
}

// parseList reads the stanzas of a Packages file.
func parseList(text []byte) []Package {
	var packages []Package
	for stanza := range bytes.SplitSeq(text, []byte("\n\n")) {
		var p Package
		for line := range bytes.SplitSeq(stanza, []byte("\n")) {
			name, value, _ := bytes.Cut(line, []byte(": "))
			switch string(name) {
			case "Package":
				p.Name = string(value)
			case "Version":
				p.Version = string(value)
			case "Architecture":
				p.Arch = string(value)
			}
		}
		if p.Name != "" {
			packages = append(packages, p)
		}
	}
	return packages
}
