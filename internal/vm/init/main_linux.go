// Command init is PID 1 of a test guest. It runs the programs of the job in
// the initramfs and reports on the console. It is no use anywhere else.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/internal/vm/job"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: runs as PID 1 of a test guest only: use vmrun")
		os.Exit(2)
	}
	var j job.Job
	err := readJob(&j)
	if err == nil {
		err = run(&j)
	}
	last := job.Event{Done: true}
	if err != nil {
		last = job.Event{Error: err.Error()}
	}
	report(j.Nonce, last)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func readJob(j *job.Job) error {
	data, err := os.ReadFile(job.Path)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, j)
}

func report(nonce string, e job.Event) {
	data, err := job.Encode(nonce, e)
	if err != nil { // cannot be: all events are plain data
		panic(err)
	}
	os.Stdout.Write(data)
}

func run(j *job.Job) error {
	if err := setUp(j); err != nil {
		return err
	}
	kmsg, err := openKernelLog()
	if err != nil {
		return err
	}
	boot, err := describe()
	if err != nil {
		return err
	}
	report(j.Nonce, job.Event{Boot: boot})
	for i := range j.Programs {
		p := &j.Programs[i]
		report(j.Nonce, job.Event{Start: &job.Start{Program: i}})
		exit, err := runProgram(p, kmsg)
		if exit != nil {
			for _, path := range p.Outputs {
				if err := sendFiles(j.Nonce, path); err != nil {
					return err
				}
			}
			exit.Program = i
			exit.KernelLog = kmsg.take()
			report(j.Nonce, job.Event{Exit: exit})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func setUp(j *job.Job) error {
	if err := rawConsole(); err != nil {
		return fmt.Errorf("console: %w", err)
	}
	for _, m := range []struct {
		fs, dir, data string
		optional      bool
	}{
		{"proc", "/proc", "", false},
		{"sysfs", "/sys", "", false},
		{"devtmpfs", "/dev", "", false},
		{"tmpfs", "/tmp", "mode=1777", false},
		{"tmpfs", "/dev/shm", "mode=1777", false},
		{"devpts", "/dev/pts", "", true},
		{"cgroup2", "/sys/fs/cgroup", "", true},
	} {
		os.MkdirAll(m.dir, 0o755) // where this matters, mount says so
		if err := unix.Mount(m.fs, m.dir, m.fs, 0, m.data); err != nil && !m.optional {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	// What a service manager gives: the kernel's own hard limit is 4096.
	limit := unix.Rlimit{Cur: 1024, Max: 1 << 19}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	for _, s := range j.Sysctls {
		path := filepath.Join("/proc/sys", strings.ReplaceAll(s.Name, ".", "/"))
		if err := os.WriteFile(path, []byte(s.Value), 0); err != nil {
			return fmt.Errorf("sysctl %s=%s: %w", s.Name, s.Value, err)
		}
	}
	return reserveHugePages(j.HugePages)
}

// rawConsole stops the terminal from rewriting what is written to it: line
// ends are to arrive as they were sent.
func rawConsole() error {
	t, err := unix.IoctlGetTermios(1, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Oflag &^= unix.OPOST
	return unix.IoctlSetTermios(1, unix.TCSETS, t)
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

func reserveHugePages(want int) error {
	if want == 0 {
		return nil
	}
	const path = "/proc/sys/vm/nr_hugepages"
	// Soon after boot the kernel now and then finds fewer than there are.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		if err := os.WriteFile(path, []byte(strconv.Itoa(want)), 0); err != nil {
			return fmt.Errorf("huge pages: %w", err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("huge pages: %w", err)
		}
		got := strings.TrimSpace(string(data))
		if got == strconv.Itoa(want) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("huge pages: asked for %d, got %s: give the guest more memory or ask for fewer", want, got)
		}
	}
}

func describe() (*job.Boot, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	boot := &job.Boot{
		Release:  unix.ByteSliceToString(u.Release[:]),
		Machine:  unix.ByteSliceToString(u.Machine[:]),
		PageSize: os.Getpagesize(),
	}
	features, err := uffdFeatures()
	if err != nil {
		boot.UffdError = err.Error()
	}
	boot.Features = features
	return boot, nil
}
