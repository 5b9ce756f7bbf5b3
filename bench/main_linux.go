package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/pager"
)

func main() {
	pager.ProcessMain(openImage)
	log.SetFlags(0)
	if len(os.Args) > 1 {
		child(os.Args[1], os.Args[2:])
	}
	var o options
	run := flag.String("run", "", "measure the workloads that match this regular expression, again if need be")
	flag.BoolVar(&o.quick, "quick", false, "only see that everything works")
	flag.StringVar(&o.results, "results", "results.json", "file that keeps what was measured")
	flag.StringVar(&o.docs, "docs", "", "directory with performance.md, to write the tables and the plot to")
	flag.Parse()
	var err error
	if o.run, err = regexp.Compile(*run); err != nil {
		log.Fatalf("-run: %v", err)
	}
	o.again = *run != ""
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	out, err := o.measure(ctx)
	fmt.Print(out)
	if err != nil {
		log.Fatal(err)
	}
}

// child is the life of this program as a part of a run. For anything else it
// returns.
func child(name string, args []string) {
	var err error
	switch name {
	case "handler":
		err = handlerMain(args)
	case "mover":
		err = moverMain(args)
	case "tracker":
		err = trackerMain(args)
	default:
		return
	}
	if err != nil {
		log.Fatal(err)
	}
	os.Exit(0)
}

// options are those of the command.
type options struct {
	run     *regexp.Regexp
	again   bool // measure what was measured before
	quick   bool
	results string
	docs    string
}

// measure measures what is missing, and returns the tables.
func (o *options) measure(ctx context.Context) (string, error) {
	f, err := readFile(o.results)
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	b, err := newBench(dir, o.quick)
	if err != nil {
		return "", err
	}
	f.Machine = machine()
	all := append(workloads(o.quick), trackWorkloads(o.quick)...)
	for _, w := range all {
		if !o.run.MatchString(w.name) || f.find(w.name) != nil && !o.again {
			continue
		}
		log.Printf("%s, %d turns", w.name, w.turns)
		r, err := b.measure(ctx, w)
		if err != nil {
			return "", err
		}
		f.put(r)
		if err := f.write(o.results); err != nil {
			return "", err
		}
	}
	if o.run.MatchString("stress-ng") && (f.Stress == "" || o.again) {
		f.Stress = stress(ctx, o.quick)
		if err := f.write(o.results); err != nil {
			return "", err
		}
	}
	out := tables(f, all)
	if o.docs == "" {
		return out, nil
	}
	if err := replaceTables(filepath.Join(o.docs, "performance.md"), out); err != nil {
		return out, err
	}
	return out, drawPlot(filepath.Join(o.docs, "performance.svg"), f, all)
}

// machine says what the numbers are of.
func machine() string {
	var u unix.Utsname
	unix.Uname(&u)
	release, _, _ := strings.Cut(string(u.Release[:]), "\x00")
	model := runtime.GOARCH
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	gcc, _ := exec.Command("gcc", "-dumpfullversion").Output()
	return fmt.Sprintf("%d × %s, Linux %s, %s, gcc %s", runtime.NumCPU(), model, release, runtime.Version(), strings.TrimSpace(string(gcc)))
}

const stressCommand = "stress-ng --userfaultfd 1 --timeout 5"

// stress runs the test of others, as a number that anyone can repeat.
func stress(ctx context.Context, quick bool) string {
	args := strings.Fields(stressCommand)
	if quick {
		args[len(args)-1] = "1"
	}
	out, err := exec.CommandContext(ctx, args[0], append(args[1:], "--metrics-brief")...).CombinedOutput()
	if err != nil {
		log.Printf("%s: %v", stressCommand, err)
		return ""
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line) // stress-ng: info: [pid] userfaultfd OPS real usr sys OPS/S …
		for i, field := range fields {
			if field != "userfaultfd" || len(fields) < i+6 {
				continue
			}
			if perSecond, err := strconv.ParseFloat(fields[i+5], 64); err == nil {
				return fmt.Sprintf("%.0f faults/s", perSecond)
			}
		}
	}
	return ""
}

// asBytes is the memory of words.
func asBytes(words []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), 8*len(words))
}
