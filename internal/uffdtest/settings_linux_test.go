package uffdtest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

const (
	hugePages = "/proc/sys/vm/nr_hugepages"

	heldFile = "UFFD_TEST_HELD_FILE" // whose mode TestHoldSettings changes
)

// TestHoldSettings is no test but a process for the one below, which kills it.
func TestHoldSettings(t *testing.T) {
	name := os.Getenv(heldFile)
	if name == "" {
		return
	}
	s := LockSettings(t)
	fmt.Println("before", setting(t, hugePages))
	for i := range 3 { // of one setting, several times
		s.Set(hugePages, fmt.Sprint(2+i))
	}
	s.Chmod(name, 0o600)
	fmt.Println("after", setting(t, hugePages))
	time.Sleep(Patience)
}

// Settings are put back when the test process is killed, alone or with all that
// the shell, or timeout(1), has started for it.
func TestSettingsOfKilled(t *testing.T) {
	RequireRoot(t)
	for name, kill := range map[string]func(pid int) error{
		"process": func(pid int) error { return unix.Kill(pid, unix.SIGKILL) },
		"group":   func(pid int) error { return unix.Kill(-pid, unix.SIGKILL) },
		"SIGTERM": func(pid int) error { return unix.Kill(-pid, unix.SIGTERM) },
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestHoldSettings$")
			cmd.Env = append(os.Environ(), heldFile+"="+file)
			cmd.Stderr = os.Stderr
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
			stdout, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Kill()
			lines := bufio.NewScanner(stdout)
			line := func(what string) string {
				if !lines.Scan() {
					t.Fatalf("no line %q: %v", what, lines.Err())
				}
				value, ok := strings.CutPrefix(lines.Text(), what+" ")
				if !ok {
					t.Fatalf("the process said %q, want %q", lines.Text(), what)
				}
				return value
			}
			before := line("before")
			if after := line("after"); after == before {
				t.Fatalf("%s stayed at %s", hugePages, before)
			}
			if err := kill(cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err == nil {
				t.Error("the process was not killed")
			}
			LockSettings(t) // when they are put back
			if now := setting(t, hugePages); now != before {
				t.Errorf("%s is %s, was %s", hugePages, now, before)
			}
			info, err := os.Stat(file)
			if err != nil || info.Mode().Perm() != 0o644 {
				t.Errorf("the file's mode is %v, was 0644; %v", info.Mode(), err)
			}
		})
	}
}

func setting(t *testing.T, path string) string {
	t.Helper()
	value, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(value))
}
