// Command images makes sheaf's container images without a container engine,
// and pushes them if told to.
//
//	go run -C charts ./cmd/images                       # build/images/{master,worker,connector}
//	go run -C charts ./cmd/images -prefix localhost/sheaf/ -tag v1 worker
//	go run -C charts ./cmd/images -prefix registry.example.com/me/ -push
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/sheaf-project/sheaf/charts/image"
)

// packages are what there are images of.
var commands = map[string]image.Command{
	"master":    {Package: "./functions/master", Env: map[string]string{"sheaf_role": "master"}},
	"worker":    {Package: "./functions/worker"},
	"connector": {Package: "./cmd/connector"},
}

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("images", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprintln(stderr, "Makes images of master, worker and connector, or of those that are named:\n\n    images [flags] [NAME...]\n    images -prefix registry.example.com/me/ -tag v1 -push\n\nFlags:")
		flags.PrintDefaults()
	}
	root := flags.String("root", "..", "folder of sheaf's source")
	out := flags.String("out", "", "folder for the images (default ROOT/build/images)")
	prefix := flags.String("prefix", "sheaf/", "what stands before an image's name")
	tag := flags.String("tag", "latest", "the images' tag")
	platforms := flags.String("platforms", "linux/amd64,linux/arm64", "what to make them for")
	push := flags.Bool("push", false, "push them to the registry that -prefix names, with the login that container tools keep")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return errors.New("see images -h")
	}
	names := flags.Args()
	if len(names) == 0 {
		names = []string{"master", "worker", "connector"}
	}
	if *out == "" {
		*out = filepath.Join(*root, "build", "images")
	}
	var to []v1.Platform
	for s := range strings.SplitSeq(*platforms, ",") {
		p, err := v1.ParsePlatform(strings.TrimSpace(s))
		if err != nil || p.OS == "" || p.Architecture == "" {
			return fmt.Errorf("-platforms has %q; expected such as linux/amd64", s)
		}
		to = append(to, *p)
	}
	for _, n := range names {
		c, known := commands[n]
		if !known {
			return fmt.Errorf("there is no image %q; there are connector, master and worker", n)
		}
		version := *tag
		if version == "latest" {
			version = ""
		}
		c.Dir, c.Name, c.Version, c.Ports = *root, n, version, []int{8080}
		index, err := image.Build(ctx, c, to)
		if err != nil {
			return err
		}
		ref, dir := *prefix+n+":"+*tag, filepath.Join(*out, n)
		if err := image.Save(index, dir, ref); err != nil {
			return err
		}
		digest, err := index.Digest()
		if err != nil {
			return err
		}
		if *push {
			if err := upload(ctx, index, ref); err != nil {
				return err
			}
		}
		fmt.Fprintf(stdout, "%s@%s %s.tar\n", ref, digest, dir)
	}
	return nil
}

func upload(ctx context.Context, index v1.ImageIndex, ref string) error {
	if host, _, _ := strings.Cut(ref, "/"); host != "localhost" && !strings.ContainsAny(host, ".:") {
		return fmt.Errorf("%s names no registry; give one, such as -prefix registry.example.com/me/", ref)
	}
	to, err := name.ParseReference(ref)
	if err != nil {
		return fmt.Errorf("%s is not the name of an image: %w", ref, err)
	}
	if err := remote.WriteIndex(to, index, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	return nil
}
