package uffdtest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Settings are settings of the whole system that a test changes. Whoever holds
// them is alone: no other test process does. They are put back when the test is
// over, by a process of their own, and so also when the test process is killed,
// alone or with its whole process group.
type Settings struct {
	t        testing.TB
	lock     *os.File
	restorer *json.Encoder // takes a saved for each change; nil before the first
}

// saved is what a setting was.
type saved struct {
	Path string
	Old  string
	Mode os.FileMode // of the file, instead of its contents, if not 0
}

// lockedFile stands for all settings. It exists on every kernel.
const lockedFile = "/proc/sys/vm/overcommit_memory"

// LockSettings waits until no other test holds the system's settings.
func LockSettings(t testing.TB) *Settings {
	t.Helper()
	lock, err := os.Open(lockedFile)
	if err != nil {
		t.Fatal(err)
	}
	for {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		t.Fatalf("locking the system's settings: %v", err)
	}
	t.Cleanup(func() { lock.Close() })
	return &Settings{t: t, lock: lock}
}

// Set writes value to a file in /proc or /sys. It skips the test if that is not
// permitted.
func (s *Settings) Set(path, value string) {
	s.t.Helper()
	old, err := os.ReadFile(path)
	if err != nil {
		skip(s.t, "%s", path)
	}
	current := strings.TrimSpace(string(old))
	if _, chosen, ok := strings.Cut(current, "["); ok { // one of several: "always [madvise] never"
		current, _, _ = strings.Cut(chosen, "]")
	}
	if err := setFile(path, current); err != nil {
		skip(s.t, "permission to write %s", path)
	}
	s.save(saved{Path: path, Old: current})
	if err := setFile(path, value); err != nil {
		s.t.Fatal(err)
	}
}

func setFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return cmp(err, f.Close())
}

func cmp(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Chmod changes the mode of a file.
func (s *Settings) Chmod(path string, mode os.FileMode) {
	s.t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.save(saved{Path: path, Mode: info.Mode().Perm()})
	if err := os.Chmod(path, mode); err != nil {
		s.t.Fatal(err)
	}
}

// save has a setting put back after the test, the last one first.
func (s *Settings) save(old saved) {
	s.t.Helper()
	if s.restorer == nil {
		s.startRestorer()
	}
	if err := s.restorer.Encode(old); err != nil {
		s.t.Fatalf("telling the process that restores settings: %v", err)
	}
}

// startRestorer starts the process that puts the settings back. It shares the
// lock, and acts when its standard input ends.
func (s *Settings) startRestorer() {
	s.t.Helper()
	restorer := Command("restore")
	restorer.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives the test's process group
	restorer.ExtraFiles = []*os.File{s.lock}
	stdin, err := restorer.StdinPipe()
	if err == nil {
		err = restorer.Start()
	}
	if err != nil {
		s.t.Fatalf("starting the process that restores settings: %v", err)
	}
	s.restorer = json.NewEncoder(stdin)
	s.t.Cleanup(func() {
		stdin.Close()
		if err := restorer.Wait(); err != nil {
			s.t.Errorf("restoring settings: %v", err)
		}
	})
}

// restore is the life of that process.
func restore() error {
	var list []saved
	for in := json.NewDecoder(os.Stdin); ; {
		var old saved
		if in.Decode(&old) != nil { // all that was sent is here
			break
		}
		list = append(list, old)
	}
	var errs []error
	for _, old := range slices.Backward(list) {
		if old.Mode != 0 {
			errs = append(errs, os.Chmod(old.Path, old.Mode))
		} else {
			errs = append(errs, setFile(old.Path, old.Old))
		}
	}
	return errors.Join(errs...)
}

// HugePages makes n huge pages of the default size free, or skips the test.
func (s *Settings) HugePages(n int) {
	s.t.Helper()
	HugetlbUnmap.Avoid(s.t)
	info := meminfo()
	if info["Hugepagesize"] == 0 {
		skip(s.t, "hugetlb memory")
	}
	free := info["HugePages_Free"] - info["HugePages_Rsvd"]
	if free >= n {
		return
	}
	const path = "/proc/sys/vm/nr_hugepages"
	s.Set(path, strconv.Itoa(info["HugePages_Total"]+n-free))
	info = meminfo()
	if free = info["HugePages_Free"] - info["HugePages_Rsvd"]; free < n {
		skip(s.t, "memory for %d huge pages (got %d)", n, free)
	}
}

// HugePagesOf makes n huge pages of size bytes free, or skips the test.
func (s *Settings) HugePagesOf(size uint64, n int) {
	s.t.Helper()
	dir := fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB/", size>>10)
	read := func(name string) int {
		text, err := os.ReadFile(dir + name)
		if err != nil {
			skip(s.t, "huge pages of %d bytes: %v", size, err)
		}
		number, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			s.t.Fatal(err)
		}
		return number
	}
	available := func() int { return read("free_hugepages") - read("resv_hugepages") }
	if available() >= n {
		return
	}
	s.Set(dir+"nr_hugepages", strconv.Itoa(read("nr_hugepages")+n-available()))
	if free := available(); free < n {
		skip(s.t, "memory for %d huge pages of %d bytes (got %d)", n, size, free)
	}
}

// HugePageSize returns the default size of huge pages in bytes, 0 if there are
// none.
func HugePageSize() int { return meminfo()["Hugepagesize"] << 10 }

func meminfo() map[string]int {
	info := make(map[string]int)
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		panic(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		var n int
		fmt.Sscan(rest, &n)
		info[name] = n
	}
	return info
}
