package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/go-uffd/uffd/internal/uffdtest"
)

// A checkpoint is a process that CRIU dumps and restores.
type checkpoint struct {
	*testing.T
	criu   []string
	images string
	work   string
	pid    int
	cmd    *exec.Cmd // until it is dumped
}

// start starts the process that is to be dumped, in a session of its own.
func start(t *testing.T, cmd *exec.Cmd) *checkpoint {
	t.Helper()
	uffdtest.RequireRoot(t)
	dir := t.TempDir()
	c := &checkpoint{T: t, criu: program(t, "criu", "usr/sbin/criu"), images: filepath.Join(dir, "images"), work: filepath.Join(dir, "work"), cmd: cmd}
	for _, name := range []string{c.images, c.work} {
		if err := os.Mkdir(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	output, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What this process has inherited is not to be dumped.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.pid = cmd.Process.Pid
	t.Cleanup(func() {
		if c.cmd != nil {
			syscall.Kill(-c.pid, syscall.SIGKILL)
			c.cmd.Wait()
		}
		if text, _ := os.ReadFile(output.Name()); t.Failed() && len(text) > 0 {
			t.Logf("output of the process:\n%s", text)
		}
	})
	return c
}

// run runs CRIU. A failure comes with the end of its log.
func (c *checkpoint) run(command string, args ...string) error {
	logName := filepath.Join(c.work, command+".log")
	args = append([]string{command, "-W", c.work, "-v4", "-o", logName}, args...)
	cmd := exec.CommandContext(c.Context(), c.criu[0], append(c.criu[1:len(c.criu):len(c.criu)], args...)...)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	text, _ := os.ReadFile(logName)
	return fmt.Errorf("criu %s: %w\n%s\n%s", command, err, out, text[max(0, len(text)-2000):])
}

// dump writes the images. The process is gone then.
func (c *checkpoint) dump(args ...string) {
	c.Helper()
	begin := time.Now()
	if err := c.run("dump", append([]string{"-t", strconv.Itoa(c.pid), "-D", c.images}, args...)...); err != nil {
		c.Fatal(err)
	}
	c.cmd.Wait() // so that its pid is free
	c.cmd = nil
	c.Logf("dumped %d MiB in %v", c.imageSize()>>20, time.Since(begin).Round(time.Millisecond))
}

func (c *checkpoint) imageSize() (size int64) {
	names, _ := filepath.Glob(filepath.Join(c.images, "pages-*.img"))
	for _, name := range names {
		if info, err := os.Stat(name); err == nil {
			size += info.Size()
		}
	}
	return size
}

// A restored is a checkpoint that runs again.
type restored struct {
	*checkpoint
	pidfd  int
	server *exec.Cmd
	output bytes.Buffer // of the server
	begin  time.Time
}

// restore restores the process, with our command in the place of CRIU's.
func (c *checkpoint) restore(args ...string) *restored {
	c.Helper()
	for tries := 0; ; tries++ {
		r := c.serve(args...)
		r.begin = time.Now()
		err := c.run("restore", "-D", c.images, "--lazy-pages", "-d")
		if err != nil {
			r.server.Process.Kill()
			r.server.Wait()
			if strings.Contains(err.Error(), "File exists") && tries < 300 { // its pid, or session, is not free until init has reaped all
				time.Sleep(100 * time.Millisecond)
				continue
			}
			c.Fatalf("%v\n%s", err, r.output.String())
		}
		c.Logf("restored after %v", time.Since(r.begin).Round(time.Millisecond))
		if r.pidfd, err = unix.PidfdOpen(c.pid, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			c.Fatal(err)
		}
		c.Cleanup(func() {
			unix.Kill(-c.pid, unix.SIGKILL)
			unix.PidfdSendSignal(r.pidfd, unix.SIGKILL, nil, 0)
			unix.Close(r.pidfd)
			r.server.Process.Kill()
			r.server.Wait()
		})
		return r
	}
}

// serve starts our command, and waits until restore can begin.
func (c *checkpoint) serve(args ...string) *restored {
	c.Helper()
	r := &restored{checkpoint: c, pidfd: -1, server: uffdtest.Command("criu-lazy-pages")}
	ready, status, err := os.Pipe()
	if err != nil {
		c.Fatal(err)
	}
	defer ready.Close()
	r.server.Args = append(r.server.Args, append([]string{"-D", c.images, "-W", c.work, "-status-fd", "3"}, args...)...)
	r.server.ExtraFiles = []*os.File{status}
	r.server.Stderr = &r.output
	err = r.server.Start()
	status.Close()
	if err != nil {
		c.Fatal(err)
	}
	ready.SetReadDeadline(time.Now().Add(uffdtest.Patience))
	if n, _ := ready.Read(make([]byte, 1)); n != 1 {
		r.server.Process.Kill()
		r.server.Wait()
		c.Fatalf("the server is not ready: %s", r.output.String())
	}
	return r
}

// complete waits until the server has done all it had to, and returns what it says
// of the tasks.
func (r *restored) complete() []numbers {
	r.Helper()
	ended := make(chan error, 1)
	go func() { ended <- r.server.Wait() }()
	select {
	case err := <-ended:
		r.Logf("the server ended after %v:\n%s", time.Since(r.begin).Round(time.Millisecond), r.output.String())
		if err != nil {
			r.Fatal(err)
		}
	case <-time.After(uffdtest.Patience):
		r.server.Process.Kill()
		<-ended
		r.Fatalf("the server does not end:\n%s", r.output.String())
	}
	return parseNumbers(r.T, r.output.String())
}

// numbers is what the server says of a task.
type numbers map[string]int

var counted = regexp.MustCompile(`(\d+) (faults|pages on demand|around them|in the background|forks|moves|discards|unmaps)`)

func parseNumbers(t *testing.T, output string) (all []numbers) {
	for line := range strings.Lines(output) {
		if !strings.Contains(line, "complete after") {
			continue
		}
		n := make(numbers)
		for _, match := range counted.FindAllStringSubmatch(line, -1) {
			n[match[2]], _ = strconv.Atoi(match[1])
		}
		if len(n) != 8 {
			t.Errorf("the server says: %s", line)
		}
		all = append(all, n)
	}
	return all
}

// layer bases the images on others, as dump --track-mem does where the kernel has
// soft-dirty pages: every other extent moves to the parent.
func (c *checkpoint) layer() {
	c.Helper()
	extents, pages, err := readPagemap(c.images, int32(c.pid))
	if err != nil {
		c.Fatal(err)
	}
	parent := filepath.Join(filepath.Dir(c.images), "parent")
	if err := errors.Join(os.Mkdir(parent, 0o755), os.Symlink("../parent", filepath.Join(c.images, "parent"))); err != nil {
		c.Fatal(err)
	}
	name := fmt.Sprintf("pagemap-%d.img", c.pid)
	var id uint32
	fmt.Sscanf(filepath.Base(pages), "pages-%d.img", &id)
	below, above := []proto.Message{head(id)}, []proto.Message{head(id)}
	all, err := os.ReadFile(pages)
	if err != nil {
		c.Fatal(err)
	}
	var belowPages, abovePages []byte
	for i, e := range extents {
		addr, n, b := e.start/pageSize, (e.end-e.start)/pageSize, all[e.offset:][:e.end-e.start]
		if i%2 == 0 || e.flags&lazy == 0 {
			above, abovePages = append(above, entry(addr, n, e.flags)), append(abovePages, b...)
			continue
		}
		above = append(above, entry(addr, n, inParent|lazy))
		below, belowPages = append(below, entry(addr, n, e.flags)), append(belowPages, b...)
	}
	if len(below) == 1 {
		c.Fatal("nothing is in the parent")
	}
	c.Logf("%d extents, %d of them in the parent", len(above)-1, len(below)-1)
	for name, b := range map[string][]byte{
		filepath.Join(c.images, name): encode(c, pagemapMagic, above...),
		pages:                         abovePages,
		filepath.Join(parent, name):   encode(c, pagemapMagic, below...),
		filepath.Join(parent, filepath.Base(pages)): belowPages,
	} {
		if err := os.WriteFile(name, b, 0o644); err != nil {
			c.Fatal(err)
		}
	}
}
