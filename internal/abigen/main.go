// Command abigen makes the golden tables of the kernel's ABI that this
// module's tests compare its own constants and structures with.
//
//	go run ./internal/abigen         write testdata/abi_*.txt
//	go run ./internal/abigen -check  fail if they differ from the headers
//
// The tables are what testdata/abi.c prints when it is compiled with the
// newest kernel headers that Debian has: once with those of x86, which encode
// ioctl requests as most architectures do, and once with those of powerpc,
// which do it as mips does too. Either way it fails when the headers have a
// constant that abi.c does not print, as those of a newer kernel may.
//
// It runs at the top of the module, on a Debian system with gcc.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/go-uffd/uffd/internal/debian"
)

const program = "testdata/abi.c"

// oldest is the first kernel that has all that abi.c prints.
const oldest = "7.3"

// suites are where to look for newer ones. A release candidate's headers may
// still change, so experimental is not among them.
var suites = []string{"trixie-backports", "sid"}

// A table is one of the encodings of ioctl requests.
type table struct {
	file string
	arch string // whose headers have it, as the kernel calls it
	text string
}

var tables = []table{
	{"testdata/abi_generic.txt", "x86", "most architectures'"},
	{"testdata/abi_powerpc.txt", "powerpc", "powerpc's and mips'"},
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("abigen: ")
	check := flag.Bool("check", false, "compare the tables with the headers instead of writing them")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *check); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, check bool) error {
	if _, err := os.Stat(program); err != nil {
		return fmt.Errorf("run it at the top of the module: %w", err)
	}
	if _, err := exec.LookPath("gcc"); err != nil {
		return fmt.Errorf("gcc is missing: install gcc and libc6-dev: %w", err)
	}
	tmp, err := os.MkdirTemp("", "abigen")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := fetchHeaders(ctx, tmp); err != nil {
		return err
	}
	var errs []error
	for _, t := range tables {
		text, err := makeTable(ctx, t, tmp)
		if err != nil {
			return err
		}
		if !check {
			err = os.WriteFile(t.file, text, 0o644)
		} else {
			err = compare(ctx, t.file, text)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// fetchHeaders unpacks the newest kernel headers into dir.
func fetchHeaders(ctx context.Context, dir string) error {
	archive, err := debian.Open("")
	if err != nil {
		return err
	}
	// The package is the same for all architectures.
	found, err := archive.Find(ctx, suites, "amd64", regexp.MustCompile("^linux-libc-dev$"))
	if len(found) == 0 {
		return err
	}
	recent := slices.DeleteFunc(slices.Clone(found), func(p debian.Package) bool {
		return debian.CompareVersions(p.Version, oldest) < 0
	})
	if len(recent) == 0 {
		return errors.Join(fmt.Errorf("the newest kernel headers are %s, and it takes %s", found[0], oldest), err)
	}
	_, deb, err := archive.DownloadFirst(ctx, recent)
	if err != nil {
		return err
	}
	return debian.Extract(ctx, deb, dir,
		"./usr/include/linux", "./usr/include/asm-generic", "./usr/lib/linux/uapi")
}

// makeTable compiles abi.c with the headers in dir and returns what it prints.
func makeTable(ctx context.Context, t table, dir string) ([]byte, error) {
	binary := filepath.Join(dir, "abi-"+t.arch)
	gcc := []string{"-std=gnu11", "-Wall", "-Wextra", "-Werror",
		"-I", filepath.Join(dir, "usr/lib/linux/uapi", t.arch), "-I", filepath.Join(dir, "usr/include"), program}
	if _, err := output(ctx, "gcc", append(gcc, "-o", binary)...); err != nil {
		return nil, err
	}
	printed, err := output(ctx, binary)
	if err != nil {
		return nil, err
	}
	macros, err := output(ctx, "gcc", append(gcc, "-E", "-dM")...)
	if err != nil {
		return nil, err
	}
	if err := complete(printed, macros); err != nil {
		return nil, fmt.Errorf("%s: %w", t.arch, err)
	}
	head := fmt.Sprintf(`# The kernel's userfaultfd ABI in %s encoding of ioctl requests.
# Made by "go run ./internal/abigen" from testdata/abi.c, which has the format,
# compiled with the headers of %s. Do not edit.
`, t.text, t.arch)
	return append([]byte(head), printed...), nil
}

var (
	defined = regexp.MustCompile(`(?m)^#define ((?:_?UFFD|USERFAULTFD_|PAGE_IS_|PM_SCAN_|PAGEMAP_SCAN)\w*) `)
	valued  = regexp.MustCompile(`(?m)^(?:const|request) (\w+) `)
)

// complete returns an error that names the macros of the headers that abi.c
// does not print, and what it prints that the headers do not define.
func complete(printed, macros []byte) error {
	inHeaders, inTable := names(defined, macros), names(valued, printed)
	var errs []error
	if missing := without(inHeaders, inTable); len(missing) > 0 {
		errs = append(errs, fmt.Errorf("%s does not print what the headers define: %s", program, strings.Join(missing, " ")))
	}
	if unknown := without(inTable, inHeaders); len(unknown) > 0 {
		errs = append(errs, fmt.Errorf("%s prints what the headers do not define: %s", program, strings.Join(unknown, " ")))
	}
	return errors.Join(errs...)
}

// names returns what the first group of re matches in text.
func names(re *regexp.Regexp, text []byte) []string {
	var found []string
	for _, match := range re.FindAllSubmatch(text, -1) {
		found = append(found, string(match[1]))
	}
	return found
}

// without returns those of some names that are not among the others.
func without(some, others []string) []string {
	return slices.DeleteFunc(slices.Clone(some), func(name string) bool {
		return slices.Contains(others, name)
	})
}

// compare returns an error with the differences between a file and what it
// should hold. Comments are none, so that a newer kernel with the same ABI
// makes no difference.
func compare(ctx context.Context, file string, want []byte) error {
	diff := exec.CommandContext(ctx, "diff", "-u", "-I", "^#", "--label", file, "--label", "headers", file, "-")
	diff.Stdin = bytes.NewReader(want)
	if out, err := diff.CombinedOutput(); err != nil {
		return fmt.Errorf("%s differs from the headers: %w\n%s", file, err, out)
	}
	return nil
}

// output runs a program and returns its standard output.
func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", filepath.Base(name), err, &stderr)
	}
	return out, nil
}
