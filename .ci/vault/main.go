// A Vault server for tests: the real core and the engines that Atoll's keyring talks to, storage in memory, one
// loopback listener. Not for keeping secrets: it forgets everything when it stops.
//
// The full server links every cloud and database plugin, which a test machine need not compile.
package main

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"time"

	hclog "github.com/hashicorp/go-hclog"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/credential/cert"
	"github.com/hashicorp/vault/builtin/logical/pki"
	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/helper/namespace"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
)

// noPlugins says that nothing but the engines linked in below exists.
type noPlugins struct{}

func (noPlugins) Contains(string, consts.PluginType) bool { return false }
func (noPlugins) Get(string, consts.PluginType) (func() (interface{}, error), bool) {
	return nil, false
}
func (noPlugins) Keys(consts.PluginType) []string { return nil }
func (noPlugins) DeprecationStatus(string, consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Unknown, false
}
func (noPlugins) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }

func main() {
	address := flag.String("listen", "127.0.0.1:0", "loopback address; port 0 takes a free one, which is printed")
	token := flag.String("root-token", "", "the root token")
	certificate := flag.String("tls-cert", "", "PEM file; with -tls-key the listener speaks TLS and asks for client certificates")
	key := flag.String("tls-key", "", "PEM file")
	flag.Parse()
	if err := serve(*address, *token, *certificate, *key); err != nil {
		log.Fatal(err)
	}
}

func serve(address, token, certificate, key string) error {
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Error, Output: os.Stderr})
	storage, err := inmem.NewInmem(nil, logger)
	if err != nil {
		return err
	}
	config := &vault.CoreConfig{
		Physical:     storage,
		Logger:       logger,
		DisableMlock: true,
		DevToken:     token,
		LogicalBackends: map[string]logical.Factory{
			"kv": kv.Factory, "pki": pki.Factory, "transit": transit.Factory,
		},
		CredentialBackends: map[string]logical.Factory{"approle": approle.Factory, "cert": cert.Factory},
		BuiltinRegistry:    noPlugins{},
	}
	core, err := vault.NewCore(config)
	if err != nil {
		return err
	}
	if err := start(core, token); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	scheme := "http"
	if certificate != "" {
		pair, err := tls.LoadX509KeyPair(certificate, key)
		if err != nil {
			return err
		}
		listener = tls.NewListener(listener, &tls.Config{
			Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12,
		})
		scheme = "https"
	}
	fmt.Printf("%s://%s\n", scheme, listener.Addr())
	handler := vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core, ListenerConfig: &configutil.Listener{}})
	return (&http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}).Serve(listener)
}

// start initialises and unseals the core, and replaces the first root token by the given one.
func start(core *vault.Core, token string) error {
	ctx := namespace.ContextWithNamespace(context.Background(), namespace.RootNamespace)
	shares := &vault.SealConfig{SecretShares: 1, SecretThreshold: 1}
	made, err := core.Initialize(ctx, &vault.InitParams{BarrierConfig: shares})
	if err != nil {
		return err
	}
	if _, err := core.Unseal(append([]byte(nil), made.SecretShares[0]...)); err != nil {
		return err
	}
	request := &logical.Request{
		Operation:   logical.UpdateOperation,
		ClientToken: made.RootToken,
		Path:        "auth/token/create",
		Data: map[string]interface{}{
			"id": token, "policies": []string{"root"}, "no_parent": true, "no_default_policy": true,
		},
	}
	response, err := core.HandleRequest(ctx, request)
	if err != nil {
		return err
	}
	if response == nil || response.Auth == nil {
		return fmt.Errorf("root token: expected one, the core answered with none")
	}
	return nil
}
