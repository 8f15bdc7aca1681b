//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them: an adapter in PEFT's
//! form from the folder `imports` of the data folder.

use crate::body::Body;
use crate::doors;
use crate::error::{ApiError, Result};
use crate::fields::Fields;
use crate::spec;
use crate::state::State;
use actix_web::{HttpRequest, HttpResponse, web};
use proto::{Domain, Generation, Import, PeftFiles, Rollback};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

/// Largest `adapter_config.json`, bytes.
const CONFIG_BYTES_MAX: usize = 1 << 20;

/// Loads an adapter from the folder `imports` of the data folder, as vLLM does.
#[utoipa::path(
    post, path = "/v1/load_lora_adapter", tag = "govern", request_body = spec::LoadLora,
    responses((status = 200, description = "It is served.", body = String, content_type = "text/plain"))
)]
pub(crate) async fn load(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let mut fields = fields(&state, &request, payload).await?;
    let lineage = name(&mut fields)?;
    let path = fields.string("lora_path")?.unwrap_or_default();
    let in_place = fields.bool("load_inplace")?.unwrap_or(false);
    fields.finish()?;
    let expected = state.gateway.registry.lineage(&lineage).current;
    if expected.is_some() && !in_place {
        let message = format!(
            "there is an adapter '{lineage}' already: unload it, or load in its place with \
             \"load_inplace\": true"
        );
        return Err(ApiError::invalid("lora_name", message));
    }
    let imports = state.gateway.info.data_dir.join("imports");
    let bytes_max = state.limits.import.bytes_max;
    let files = web::block(move || read_files(&imports, &path, bytes_max)).await;
    let files = files.map_err(|error| ApiError::internal(&error))??;
    let import = Import { lineage: lineage.clone(), files, expected };
    doors::ask(&state.gateway.doors.import, import).await?;
    Ok(told(format!("Success: LoRA adapter '{lineage}' added successfully.")))
}

/// Takes back what was loaded.
#[utoipa::path(
    post, path = "/v1/unload_lora_adapter", tag = "govern", request_body = spec::UnloadLora,
    responses((status = 200, description = "It is no longer served.", body = String, content_type = "text/plain"))
)]
pub(crate) async fn unload(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse> {
    let mut fields = fields(&state, &request, payload).await?;
    let lineage = name(&mut fields)?;
    // vLLM's own number of an adapter: its name says which it is.
    fields.whole("lora_int_id", 0..=u32::MAX)?;
    fields.finish()?;
    let registry = &state.gateway.registry;
    let loaded = registry.chain(&lineage).into_iter().take_while(|generation| is_loaded(generation)).count();
    if loaded == 0 {
        let learned = registry.lineage(&lineage).current.is_some();
        let message = if learned {
            format!("'{lineage}' was learned here, not loaded: roll it back, or forget its documents")
        } else {
            format!("there is no adapter '{lineage}'; GET /v1/models lists them")
        };
        let error = if learned { ApiError::conflict(message) } else { ApiError::not_found(message) };
        return Err(error.param("lora_name"));
    }
    for _ in 0..loaded {
        let expected = registry.lineage(&lineage).current;
        let back = Rollback { lineage: lineage.clone(), to: None, expected };
        doors::ask(&state.gateway.doors.rollback, back).await?;
    }
    Ok(told(format!("Success: LoRA adapter '{lineage}' removed successfully.")))
}

/// Whether a generation came from elsewhere: it learned nothing, and is no sum of others.
fn is_loaded(generation: &Generation) -> bool {
    generation.after == generation.through && generation.merged_from.is_empty()
}

async fn fields(state: &State, request: &HttpRequest, payload: web::Payload) -> Result<Fields> {
    let body = Body::read(request, payload, state.limits.body, &state.bodies).await?;
    Fields::of(body.json()?.0, "")
}

fn name(fields: &mut Fields) -> Result<Domain> {
    let name = fields.string("lora_name")?;
    let name = name.ok_or_else(|| fields.must_be("lora_name", "the name that the adapter is to have"))?;
    Domain::new(name).map_err(|error| ApiError::bad_name("lora_name", &error))
}

fn told(message: String) -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain; charset=utf-8").body(message)
}

/// The adapter in the folder `path` of the folder `imports`, and nothing outside it.
fn read_files(imports: &Path, path: &str, bytes_max: usize) -> Result<PeftFiles> {
    let config = read(imports, path, "adapter_config.json", CONFIG_BYTES_MAX)?;
    let config = String::from_utf8(config).map_err(|_| unreadable(path, "adapter_config.json"))?;
    let weights = read(imports, path, "adapter_model.safetensors", bytes_max)?;
    Ok(PeftFiles { config, weights })
}

fn read(imports: &Path, path: &str, name: &str, bytes_max: usize) -> Result<Vec<u8>> {
    let mut parts = Path::new(path).components().peekable();
    let plain = parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)));
    let missing = |_| {
        let message = format!("there is no {name} in the folder '{path}' of {}", imports.display());
        ApiError::not_found(message).param("lora_path")
    };
    let outside = || {
        let message = format!("'lora_path' must be the name of a folder in {}", imports.display());
        ApiError::invalid("lora_path", message)
    };
    if !plain || path.contains('\0') {
        return Err(outside());
    }
    // A link may lead out of the folder, so it is where it leads that counts.
    let root = imports.canonicalize().map_err(missing)?;
    let file = root.join(path).join(name).canonicalize().map_err(missing)?;
    if !file.starts_with(root) {
        return Err(outside());
    }
    let mut bytes = Vec::new();
    let read = File::open(file).and_then(|file| file.take(bytes_max as u64 + 1).read_to_end(&mut bytes));
    read.map_err(|_| unreadable(path, name))?;
    if bytes.len() > bytes_max {
        let message = format!("{path}/{name} is over {bytes_max} bytes, which is what is read");
        return Err(ApiError::too_large(message).param("lora_path"));
    }
    Ok(bytes)
}

fn unreadable(path: &str, name: &str) -> ApiError {
    ApiError::invalid("lora_path", format!("{path}/{name} cannot be read"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::ResponseError;
    use std::fs;

    #[test]
    fn only_folders_of_imports_are_read() {
        let data = tempfile::tempdir().expect("a folder");
        let imports = data.path().join("imports");
        for folder in [data.path().join("secret"), imports.join("a/nested"), imports.join("large")] {
            fs::create_dir_all(&folder).expect("made");
            fs::write(folder.join("adapter_config.json"), "{}").expect("written");
            fs::write(folder.join("adapter_model.safetensors"), [7; 10]).expect("written");
        }
        fs::write(imports.join("large/adapter_model.safetensors"), [7; 11]).expect("written");
        fs::create_dir(imports.join("empty")).expect("made");
        let files = read_files(&imports, "a/nested", 10).expect("read");
        assert_eq!((files.config.as_str(), files.weights.len()), ("{}", 10));
        let absolute = data.path().join("secret").display().to_string();
        #[cfg(unix)]
        std::os::unix::fs::symlink(&absolute, imports.join("link")).expect("linked");
        for (path, status) in [
            ("../secret", 400),
            (&absolute, 400),
            ("link", 400),
            ("", 400),
            ("a/../../secret", 400),
            ("a\0", 400),
            ("missing", 404),
            ("empty", 404),
            ("large", 413),
        ] {
            let error = read_files(&imports, path, 10).expect_err(path);
            assert_eq!(error.status_code(), status, "{path}: {error}");
            assert_eq!(error.body()["error"]["param"], "lora_path", "{path}");
        }
    }
}
