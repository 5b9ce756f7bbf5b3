package uffdtest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Settings are settings of the whole system that a test changes. Whoever holds
// them is alone: no other test process does. They are put back when the test is
// over, by a process of their own, and so also when the test process dies.
type Settings struct {
	t    testing.TB
	lock *os.File
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
	return &Settings{t, lock}
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
	s.restoreAfter(path, current)
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
	s.restoreAfter(path, modePrefix+strconv.FormatUint(uint64(info.Mode().Perm()), 8))
	if err := os.Chmod(path, mode); err != nil {
		s.t.Fatal(err)
	}
}

// modePrefix marks what is restored as a file's mode, in octal.
const modePrefix = "mode:"

// restoreAfter starts the process that puts a setting back. It shares the lock,
// and acts when its standard input ends.
func (s *Settings) restoreAfter(path, old string) {
	s.t.Helper()
	restorer := Command("restore", "UFFD_TEST_RESTORE="+path+"="+old)
	restorer.SysProcAttr = nil // it outlives the test process
	restorer.ExtraFiles = []*os.File{s.lock}
	stdin, err := restorer.StdinPipe()
	if err == nil {
		err = restorer.Start()
	}
	if err != nil {
		s.t.Fatalf("starting the process that restores %s: %v", path, err)
	}
	s.t.Cleanup(func() {
		stdin.Close()
		if err := restorer.Wait(); err != nil {
			s.t.Errorf("restoring %s to %q: %v", path, old, err)
		}
	})
}

// restore is the life of that process.
func restore() error {
	path, old, _ := strings.Cut(os.Getenv("UFFD_TEST_RESTORE"), "=")
	io.Copy(io.Discard, os.Stdin)
	if octal, ok := strings.CutPrefix(old, modePrefix); ok {
		mode, err := strconv.ParseUint(octal, 8, 32)
		return cmp(err, os.Chmod(path, os.FileMode(mode)))
	}
	return setFile(path, old)
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
