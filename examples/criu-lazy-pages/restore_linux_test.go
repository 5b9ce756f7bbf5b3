package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestMain(m *testing.M) {
	uffdtest.Main(m,
		uffdtest.Role{Name: "criu-lazy-pages", Run: func() error { return run(os.Args[1:], os.Stderr) }},
		uffdtest.Role{Name: "plain", Run: plain},
		uffdtest.Role{Name: "changing", Run: changing},
		uffdtest.Role{Name: "tree", Run: tree},
		uffdtest.Role{Name: "tree-child", Run: treeChild},
		uffdtest.Role{Name: "tree-zombie", Run: treeZombie},
	)
}

// The processes are restored twice: so that nothing comes but what they touch, and
// with the rest on its way at the same time.
var delays = map[string][]string{
	"on demand":  {"-delay", "1h"},
	"background": nil,
}

func TestPlain(t *testing.T) {
	for name, args := range delays {
		t.Run(name, func(t *testing.T) {
			c, dir := victim(t, "plain")
			c.dump()
			signalFile(t, dir, "go")
			r := c.restore(args...)
			r.verdict(dir)
			n := r.complete()
			if len(n) != 1 {
				t.Fatalf("%d tasks", len(n))
			}
			if args != nil && (n[0]["faults"] == 0 || n[0]["pages on demand"]+n[0]["around them"] < 64<<20/int(pageSize)) {
				t.Errorf("it was not served on demand: %v", n[0])
			}
		})
	}
}

// A process that is left alone gets all its memory without asking.
func TestComplete(t *testing.T) {
	c, dir := victim(t, "plain")
	c.dump()
	r := c.restore()
	n := r.complete()
	if len(n) != 1 || n[0]["in the background"] < 64<<20/int(pageSize)*9/10 {
		t.Errorf("it did not come in the background: %v", n)
	}
	signalFile(t, dir, "go")
	r.verdict(dir) // nobody serves it any more
}

func TestChanging(t *testing.T) {
	for name, args := range delays {
		t.Run(name, func(t *testing.T) {
			c, dir := victim(t, "changing")
			c.dump()
			signalFile(t, dir, "go")
			r := c.restore(args...)
			r.verdict(dir)
			n := r.complete()
			if args == nil {
				return
			}
			for _, event := range []string{"forks", "moves", "discards", "unmaps"} {
				if n[0][event] == 0 {
					t.Errorf("no %s: %v", event, n[0])
				}
			}
		})
	}
}

func TestTree(t *testing.T) {
	for name, args := range delays {
		t.Run(name, func(t *testing.T) {
			c, dir := victim(t, "tree")
			c.dump()
			signalFile(t, dir, "go")
			r := c.restore(args...)
			r.verdict(dir)
			if n := r.complete(); len(n) != 2 {
				t.Errorf("%d tasks, want 2", len(n))
			}
		})
	}
}

// Images that are based on others.
func TestParent(t *testing.T) {
	for name, args := range delays {
		t.Run(name, func(t *testing.T) {
			c, dir := victim(t, "changing")
			c.dump()
			c.layer()
			signalFile(t, dir, "go")
			r := c.restore(args...)
			r.verdict(dir)
			r.complete()
		})
	}
}

// A restore that fails ends the command, with an error.
func TestRestoreFails(t *testing.T) {
	c, _ := victim(t, "plain")
	c.dump()
	r := c.serve()
	conn, err := net.Dial("unix", filepath.Join(c.work, "lazy-pages.socket"))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := r.server.Wait(); err == nil || !strings.Contains(r.output.String(), "it has failed") {
		t.Errorf("%v: %s", err, r.output.String())
	}
}
