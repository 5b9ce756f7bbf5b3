// Package vm runs programs on real Linux kernels, in virtual machines that
// exist for the time of the run and contain nothing but a PID 1 of its own and
// those programs.
package vm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/go-uffd/uffd/internal/vm/job"
)

// Config is what to boot and what to run there.
type Config struct {
	Machine *Machine
	Kernel  string // its image, as built for the machine

	Memory   int      // in MiB; 0 means 1024. With less than 512 there are no transparent huge pages.
	CPUs     int      // 0 means 2
	Append   string   // to the kernel's command line
	QEMUArgs []string // after all others

	Job   job.Job // without Nonce, which Run chooses
	Files []File  // what the programs need, and themselves

	// BootLimit is the time the kernel may take up to PID 1; 0 means two minutes.
	BootLimit time.Duration

	// Output gets all that the programs (and a dying kernel) write, as it
	// comes. What firmware and kernel say before there is a PID 1 is only
	// written if there is none in the end.
	Output io.Writer
}

func (c *Config) memory() int {
	if c.Memory == 0 {
		return 1024
	}
	return c.Memory
}

func (c *Config) cpus() int {
	n := c.CPUs
	if n == 0 {
		n = 2
	}
	if most := c.Machine.cpus; most != 0 {
		n = min(n, most)
	}
	return n
}

func (c *Config) bootLimit() time.Duration {
	if c.BootLimit == 0 {
		return 2 * time.Minute
	}
	return c.BootLimit
}

// runLimit is the time after which a booted guest has long given up by itself.
func (c *Config) runLimit() time.Duration {
	limit := time.Minute
	for _, p := range c.Job.Programs {
		limit += p.Limit + 30*time.Second
	}
	return limit
}

// Errors of a guest that did not come to its end. They tell apart a dead
// kernel, one that does nothing any more, and an end without the marker.
var (
	ErrPanic    = errors.New("the kernel panicked")
	ErrTimeout  = errors.New("the guest did not come to an end")
	ErrNoMarker = errors.New("the guest ended without its end marker")
)

// Run boots the guest, runs the programs one after the other and passes every
// event to handle. It returns nil when all of them were run and reported,
// whatever their exit status.
func Run(ctx context.Context, c *Config, handle func(job.Event) error) error {
	qemu, err := c.Machine.QEMU()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "uffd-vm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c.Job.Nonce = filepath.Base(dir)
	initramfs := filepath.Join(dir, "initramfs")
	if err := writeInitramfs(ctx, initramfs, c); err != nil {
		return err
	}

	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	cmd := exec.CommandContext(ctx, qemu[0], append(qemu[1:], c.Machine.arguments(c, initramfs)...)...)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	console, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	unlock := dieTogether(cmd)
	defer unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	g := guest{config: c, handle: handle, stop: stop}
	g.limit(c.bootLimit(), "no sign of PID 1")
	watchErr := g.watch(console)
	g.timer.Stop()
	if watchErr != ErrNoMarker {
		stop(nil)
		cmd.Wait() // QEMU was killed: nothing to learn from its status
		return watchErr
	}
	waitErr := cmd.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx) // that is why it ended
	}
	return fmt.Errorf("%w (QEMU: %v %s)", ErrNoMarker, waitErr, bytes.TrimSpace(complaints.Bytes()))
}

// A guest is a machine that runs.
type guest struct {
	config *Config
	handle func(job.Event) error
	stop   context.CancelCauseFunc
	timer  *time.Timer
}

// limit stops the machine after d, unless another limit is set before.
func (g *guest) limit(d time.Duration, what string) {
	if g.timer != nil {
		g.timer.Stop()
	}
	g.timer = time.AfterFunc(d, func() {
		g.stop(fmt.Errorf("%w: %s after %v", ErrTimeout, what, d))
	})
}

// watch reads the console up to the end marker. ErrNoMarker means that there
// was none, and nothing that tells why.
func (g *guest) watch(console io.Reader) error {
	r := bufio.NewReader(console)
	var boot bytes.Buffer
	booted := false
	defer func() {
		if !booted {
			boot.WriteTo(g.config.Output)
		}
	}()
	panicked := false
	var so progress
	for {
		line, readErr := r.ReadBytes('\n')
		output, event, err := job.Decode(g.config.Job.Nonce, line)
		if !booted {
			boot.Write(output)
		} else if len(output) > 0 {
			if _, err := g.config.Output.Write(output); err != nil {
				return err
			}
		}
		if !panicked && bytes.Contains(output, []byte("Kernel panic - not syncing")) {
			panicked = true
			// It resets the machine after its last words. Some kernels do not.
			g.limit(5*time.Second, "a kernel that panicked")
		}
		switch {
		case panicked && readErr != nil:
			return ErrPanic
		case readErr != nil:
			return ErrNoMarker
		case err != nil:
			return err
		case event == nil:
		case event.Error != "":
			return fmt.Errorf("guest: %s", event.Error)
		case !so.follows(event, len(g.config.Job.Programs)):
			return fmt.Errorf("the guest reported %+v too early: what comes before was lost on the console", *event)
		case event.Done:
			return nil
		default:
			if event.Boot != nil {
				booted = true
				g.limit(g.config.runLimit(), "no end marker")
			}
			if err := g.handle(*event); err != nil {
				return err
			}
		}
	}
}

// progress is how far a guest has come. An event that another writer to the
// console has damaged looks like output: what is missing is seen by what comes
// next.
type progress struct {
	booted         bool
	started, ended int // programs
}

// follows reports whether e is what may come next, and goes on.
func (p *progress) follows(e *job.Event, programs int) (ok bool) {
	running := p.started > p.ended
	switch {
	case e.Boot != nil:
		ok = !p.booted
		p.booted = true
	case e.Start != nil:
		ok = p.booted && !running && e.Start.Program == p.started
		p.started++
	case e.File != nil:
		ok = running
	case e.Exit != nil:
		ok = running && e.Exit.Program == p.ended
		p.ended++
	case e.Done:
		ok = p.booted && p.ended == programs
	}
	return ok
}
